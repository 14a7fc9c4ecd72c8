"""The tables and pictures of docs/identity.md.

    python benchmarks/identity.py factors        how far apart the characters are
    python benchmarks/identity.py encoder        how well the face encoder tells unseen persons apart
    python benchmarks/identity.py measure        who is drawn, where, with every part and without each
    python benchmarks/identity.py nearest        who is drawn, as pixels tell, without any network
    python benchmarks/identity.py pictures       one person in several poses and styles

`measure` is `imprompt evaluate --what identity`; its figures go to benchmarks/results/identity.json, a table
of them into docs/identity.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from pages import DOCS, RESULTS, header, publish, row

from imprompt.core.images import image_grid, pixels_to_images
from imprompt.diorama import FACTORS, STYLES, gallery, portrait, sample_character
from imprompt.evaluation.portraits import drawn, templates, unseen_portraits

IMAGES = DOCS / "images"
FIGURES = RESULTS / "identity.json"
GUIDANCE = 2.0
SEED = 8_000_000
VISIBLE = 0.15  # of a channel's range in [-1, 1]


def factors(count: int = 4) -> None:
    """Pixels that change when one factor alone does, per style: the mean over `count` characters."""
    print("| pixels of 4,096 that change |", " | ".join(STYLES), "|")
    print("|---|" + "---:|" * len(STYLES))
    for name, values in FACTORS.items():
        cells = []
        for style in STYLES:
            scenes = []
            for i in range(count):
                character = sample_character(SEED + i)
                others = [value for value in values if value != getattr(character, name)]
                other = replace(character, **{name: others[i % len(others)]})
                scenes += [portrait(SEED + i, one, style=style) for one in (character, other)]
            pixels = drawn(scenes).unflatten(0, (-1, 2))
            changed = ((pixels[:, 0] - pixels[:, 1]).abs().amax(1) > VISIBLE).flatten(1)
            cells.append(f"{changed.sum(1).float().mean():.0f}")
        print(f"| {name.replace('_', ' ')} |", " | ".join(cells), "|")


def encoder(path: str, pictures: int = 2) -> None:
    """Rank-1 among the hundred by templates, and by one reference picture; landmarks; per style."""
    from imprompt.encoders.face import load_face_encoder

    faces = load_face_encoder(path)
    portraits = unseen_portraits(len(gallery()) * pictures)
    pixels = drawn(portraits.targets)
    embeds = faces.embeds(pixels)
    wanted = torch.arange(len(embeds)) % len(gallery())
    by_templates = (embeds @ templates(faces, portraits.characters).T).argmax(1) == wanted
    references = faces.embeds(drawn(portraits.references[: len(gallery())]))
    by_reference = (embeds @ references.T).argmax(1) == wanted
    error = (faces.landmarks(pixels) - _places(portraits.targets)).norm(dim=2).mean(1) * 64
    print("| style | rank-1, six pictures each | rank-1, one picture each | landmarks, px |")
    print("|---|---:|---:|---:|")
    styles = [scene.style for scene in portraits.targets]
    for style in ("all", *STYLES):
        of_style = torch.tensor([style in ("all", one) for one in styles])
        print(
            f"| {style} | {by_templates[of_style].float().mean():.1%} | "
            f"{by_reference[of_style].float().mean():.1%} | {error[of_style].mean():.2f} |"
        )


def measure(folder: Path | None, count: int, output: Path) -> None:
    from imprompt.bases import load_base
    from imprompt.evaluation.measure import Sampling
    from imprompt.evaluation.run import Request, evaluate

    request = Request(
        adapter_file=folder,
        load=partial(load_base, "diorama"),
        count=count,
        output=output,
        sampling=Sampling(steps=25, sampler="dpm-solver++", guidance_scale=GUIDANCE),
    )
    figures = evaluate("identity", request)
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    publish(DOCS / "identity.md", "identity", identity_table(figures))


def nearest(folder: Path | None, count: int, candidates: int = 20) -> None:
    """Of renders of what was asked for that differ by the person alone, how often is the right one nearest?

    The distance is that of pixels, so that nothing which pleases a network, and is not seen, can count.
    """
    from imprompt.bases import load_base
    from imprompt.checkpoints.identity import load_identity
    from imprompt.core.shipped import IDENTITIES, shipped
    from imprompt.evaluation.identity import draw_identity
    from imprompt.evaluation.measure import Sampling
    from imprompt.generation.faces import face_encoder_of

    base, identity = load_base("diorama"), load_identity(folder or shipped(IDENTITIES["diorama"]))
    portraits = unseen_portraits(count)
    sampling = Sampling(steps=25, sampler="dpm-solver++", guidance_scale=GUIDANCE)
    faces = face_encoder_of(identity.adapter, None)
    made = draw_identity(base, identity, faces, portraits, sampling)
    right, by_lot = 0, torch.Generator().manual_seed(0)
    for image, scene in zip(made, portraits.targets, strict=True):
        order = torch.randperm(len(gallery()), generator=by_lot).tolist()
        others = [gallery()[i] for i in order if gallery()[i] != scene.character]
        persons = [scene.character, *others[: candidates - 1]]
        renders = drawn([replace(scene, character=person) for person in persons])
        distances = (renders - image.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
        right += int(distances.argmin() == 0)
    print(f"nearest of {candidates} renders: the right person in {right} of {count}")


def identity_table(figures: dict[str, float]) -> str:
    """Rows: renders, then what is drawn with every part and without each."""
    shown = ("right character", "landmark error in px, median", "landmark error in px")
    shown += ("style of the text", "setting of the text")
    lines = header("", *shown)
    for name in dict.fromkeys(key.split(": ")[0] for key in figures):
        values = {what: figures[f"{name}: {what}"] for what in shown}
        lines += row(name, *(f"{v:.2f}" if "px" in k else f"{v:.1%}" for k, v in values.items()))
    return lines


def _places(scenes: list) -> torch.Tensor:
    from imprompt.diorama import landmarks_of

    return landmarks_of(scenes)


def characters() -> None:
    """Twelve of the gallery, each in the six styles."""
    scenes = [
        portrait(SEED + 10 * i + k, gallery()[i], style=style)
        for k, style in enumerate(STYLES)
        for i in range(12)
    ]
    image_grid(pixels_to_images(drawn(scenes)), 12).save(IMAGES / "characters.png")


def pictures() -> None:
    """Three persons: the reference, then each in poses, styles and settings that a text asks for."""
    import imprompt
    from imprompt.checkpoints.identity import load_identity
    from imprompt.core.shipped import IDENTITIES, shipped
    from imprompt.diorama import landmarks_of
    from imprompt.generation.identity import IdentityPrompt

    characters()
    base = imprompt.load_base("diorama")
    identity = load_identity(shipped(IDENTITIES["diorama"]))
    texts = (
        "a person in a red shirt in a meadow, made of clay",
        "a person in a blue shirt in the desert, as a cartoon",
        "a person in a green shirt in the snow, in crayon",
        "a person in a yellow shirt in a studio, as line art",
        "a person in a purple shirt in a meadow, as a watercolor",
        "a person in a teal shirt at night, in neon light",
    )
    poses = [portrait(SEED + 500 + i, gallery()[0]) for i in range(len(texts))]
    cells = []
    for number in (3, 17, 42, 71):
        reference = drawn([portrait(SEED + 700 + number, gallery()[number], style="clay")])
        cells += pixels_to_images(reference)
        prompt = IdentityPrompt(reference[0], identity, landmarks=landmarks_of(poses))
        cells += imprompt.generate(base, list(texts), identities=[prompt], steps=25, seed=1,
                                   guidance_scale=GUIDANCE, sampler="dpm-solver++")  # fmt: skip
    enlarged = [cell.resize((128, 128), 0) for cell in cells]
    image_grid(enlarged, 1 + len(texts)).save(IMAGES / "identity.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("factors", "encoder", "measure", "nearest", "pictures"))
    parser.add_argument("--identity", type=Path, help="another folder than the shipped one")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("runs/identity-look"))
    parser.add_argument("--face-encoder", default="diorama")
    arguments = parser.parse_args()
    if arguments.what == "factors":
        factors()
    elif arguments.what == "encoder":
        encoder(arguments.face_encoder)
    elif arguments.what == "measure":
        measure(arguments.identity, arguments.count, arguments.output)
    elif arguments.what == "nearest":
        nearest(arguments.identity, arguments.count)
    else:
        pictures()
