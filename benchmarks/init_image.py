"""The picture of docs/image-prompts.md: drawings that begin from a picture, with and without an image prompt.

    python benchmarks/init_image.py

writes docs/images/init-image.png, in half a minute.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pages import DOCS
from PIL import Image
from torch import Tensor

import imprompt
from imprompt.core.images import image_grid, pixels_to_images
from imprompt.diorama import render, sample_scene

PLACED = {"placement": "center", "camera": "low", "size": "small"}
PHOTO = sample_scene(3, kind="house", colour="yellow", style="clay", setting="meadow", **PLACED)
PROMPT = sample_scene(
    4, kind="castle", colour="purple", style="watercolor", setting="snow", **PLACED
)
STRENGTHS = (0.4, 0.6, 0.8)
TEXT = "a red car in a meadow"
CELL_PX = 112
SIDE_PX = 64


def main() -> None:
    photo, shown = pixels_to_images(render([PHOTO, PROMPT], SIDE_PX).pixels)
    base = imprompt.load_base("diorama")
    image_prompt = imprompt.ImagePrompt(shown, adapter=imprompt.load_adapter("diorama"))
    mask = middle()
    starts = [imprompt.InitImage(image=photo, strength=strength) for strength in STRENGTHS]
    starts.append(imprompt.InitImage(image=photo, strength=1, mask=mask))
    white_anew = Image.fromarray((mask * 255).byte().numpy())
    cells: list[Image.Image] = []
    labels: list[str] = []
    for first, label, text, prompts in (
        (photo, "from this picture", TEXT, ()),
        (shown, "image prompt", "", image_prompt),
    ):
        drawn = [imprompt.generate(base, text, prompts, init_image=start)[0] for start in starts]
        cells += [first, *drawn[:-1], white_anew.convert("RGB"), drawn[-1]]
        labels += [label, *(f"strength {s}" for s in STRENGTHS), "white drawn anew", "so masked"]
    cells = [cell.resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS) for cell in cells]
    image_grid(cells, len(cells) // 2, labels).save(DOCS / "images" / "init-image.png")


def middle() -> Float[Tensor, "height width"]:
    """A mask of the middle, with a soft edge."""
    along = torch.linspace(-1, 1, SIDE_PX)
    distance = torch.hypot(along[:, None] - 0.15, along[None])
    return ((0.95 - distance) / 0.12).clamp(0, 1)


if __name__ == "__main__":
    main()
