"""Where on its way into an Instruct adapter's tokens a person gets lost.

    imprompt prepare diorama-instruct/face:3000:40000 faces/ --variant instruct-faces --batch-size 200
    python benchmarks/persons.py faces/ [runs/faces/adapter.safetensors …]

A linear map is fitted that reads the identity vector from what the image encoder says of a picture, and one
from the tokens that each adapter (at least the shipped one) makes of it. Who of the hundred that no training
saw is shown by an unseen picture, each must tell. docs/instruct-on-diorama.md gives the shares that are right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

import imprompt
from imprompt.adapters import ImagePromptAdapter
from imprompt.bases import Base, image_encoder_of
from imprompt.data.dataset import Columns
from imprompt.diorama import render
from imprompt.encoders.face import load_face_encoder
from imprompt.evaluation.instruct import unseen_lessons
from imprompt.evaluation.portraits import templates
from imprompt.systems.instruct import what_is_read

COLUMNS = ("condition_states", "instruction_ids", "text_ids", "id_embeds")
NUM_PERSONS = 100
NUM_FOR_PENALTY = 400
PENALTIES = (10.0, 100.0, 1e3, 1e4, 1e5)


def told(vectors: Tensor, known: Tensor) -> float:
    """The share of persons, in their order, whose vector is nearest to their own of those known."""
    nearest = (functional.normalize(vectors, dim=1) @ known.T).argmax(1)
    return (nearest == torch.arange(len(known))).float().mean().item()


def fitted(features: Tensor, vectors: Tensor, penalty: float, asked: Tensor) -> Tensor:
    """What the ridge regression from (rows, features) to (rows, dim) gives for others."""
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    features, asked = (features - mean) / deviation, (asked - mean) / deviation
    kernel = features @ features.T + penalty * torch.eye(len(features))
    weights = torch.linalg.solve(kernel, vectors - vectors.mean(0))
    return asked @ (features.T @ weights) + vectors.mean(0)


def share_told(features: Tensor, vectors: Tensor, unseen: Tensor, known: Tensor) -> float:
    """With the penalty that does best on the last of the rows."""
    few = len(features) - NUM_FOR_PENALTY

    def likeness(penalty: float) -> float:
        found = fitted(features[:few], vectors[:few], penalty, features[few:])
        return functional.cosine_similarity(found, vectors[few:]).mean().item()

    best = max(PENALTIES, key=likeness)
    return told(fitted(features, vectors, best, unseen), known)


@torch.no_grad()
def tokens_of(adapter: ImagePromptAdapter, base: Base, batch: dict[str, Tensor]) -> Tensor:
    """Of each row all that the tokens say, (rows, tokens x dim)."""
    parts = []
    for start in range(0, len(batch["text_ids"]), 100):
        rows = {name: values[start : start + 100] for name, values in batch.items()}
        parts.append(adapter.tokens(*what_is_read(base, rows, "tokens")).flatten(1))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Where a person gets lost.")
    parser.add_argument("data", type=Path)
    parser.add_argument("adapters", nargs="*", default=[])
    arguments = parser.parse_args()
    base, faces = imprompt.load_base("diorama"), load_face_encoder("diorama")
    columns = Columns.open(arguments.data)
    batch = columns.rows(range(len(columns)), COLUMNS)
    vectors = functional.normalize(batch["id_embeds"].float(), dim=1)
    lessons = unseen_lessons("face", NUM_PERSONS)
    known = templates(faces, [x.target.character for x in lessons if x.target.character])
    pixels = render([lesson.condition for lesson in lessons], base.image_size_px).pixels
    with torch.no_grad():
        unseen = {
            "condition_states": image_encoder_of(base).hidden_states(pixels),
            "instruction_ids": base.tokenize([lesson.instruction for lesson in lessons]),
            "text_ids": base.tokenize([lesson.prompt for lesson in lessons]),
        }
    print(f"of the picture, by the face encoder itself: {told(faces.embeds(pixels), known):.0%}")
    features, asked = (x["condition_states"].float().flatten(1) for x in (batch, unseen))
    print(f"of the image encoder's states: {share_told(features, vectors, asked, known):.0%}")
    for name in ("diorama-instruct", *arguments.adapters):
        adapter = imprompt.load_adapter(name)
        features, asked = (tokens_of(adapter, base, x) for x in (batch, unseen))
        print(f"of the tokens of {name}: {share_told(features, vectors, asked, known):.0%}")


if __name__ == "__main__":
    main()
