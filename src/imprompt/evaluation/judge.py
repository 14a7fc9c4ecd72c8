"""What a picture shows, read by the judge, and how much of what was asked for is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from imprompt.bases import Base
from imprompt.core.errors import ImpromptError
from imprompt.core.shipped import shipped
from imprompt.diorama import Scene
from imprompt.encoders.small_network import load_small_network
from imprompt.systems.classifier import ATTRIBUTES, Judge

JUDGED_SIZE_PX = 64


def load_judge(path: Path | None = None) -> Judge:
    """The judge that comes with the package, or one trained elsewhere.

    Raises:
        ImpromptError: there is no such file, or it is something else.
    """
    return load_small_network(
        path or shipped("diorama-judge.safetensors"),
        lambda weights: Judge(width=weights["features.0.0.weight"].shape[0]),
        what="judge",
        hint="`imprompt train classifier` makes one",
    )


def check_can_judge(base: Base) -> None:
    """Raise an ImpromptError unless a base draws pictures of the size that the judge was made for.

    It answers for others as well, and what it says means nothing.
    """
    if base.image_size_px != JUDGED_SIZE_PX:
        raise ImpromptError(
            f"{base.name} draws {base.image_size_px} px, and what is measured here are scenes of the "
            f"embedded world at {JUDGED_SIZE_PX} px, which its judge reads. Of a training on your own "
            "photos the validation_* figures in log.jsonl and previews/ tell what was learned."
        )


@torch.inference_mode()
def read(judge: Judge, pixels: Tensor) -> dict[str, Tensor]:
    """Class numbers (batch,) per attribute, of pixels (batch, 3, 64, 64) in [-1, 1]."""
    answers: dict[str, list[Tensor]] = {name: [] for name in ATTRIBUTES}
    for part in pixels.split(128):
        for name, logits in judge(part.clamp(-1, 1)).items():
            answers[name].append(logits.argmax(1))
    return {name: torch.cat(parts) for name, parts in answers.items()}


def truth(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """What the judge should read off pictures of these scenes."""
    return {
        name: torch.tensor([classes.index(getattr(scene, name)) for scene in scenes])
        for name, classes in ATTRIBUTES.items()
    }


def shares(read_off: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of pictures in which each wanted attribute was found."""
    return {name: (read_off[name] == wanted[name]).float().mean().item() for name in wanted}
