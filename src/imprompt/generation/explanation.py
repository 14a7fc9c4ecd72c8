"""Where image prompts acted: heat maps over the pictures they made.

At every site and position the image's part of the decoupled attention stands beside the text's. The
map shows the image's share of the two, ‖Z_image‖ / (‖Z_text‖ + ‖Z_image‖), averaged over steps and
sites. (The attention weights themselves say little here: the image's own softmax sums to one
everywhere.)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
import torch.nn.functional as functional
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from imprompt.adapters import Handle
from imprompt.adapters.attention import CONDITION_KEY, KeyValue, SiteCondition, grid_of
from imprompt.core.errors import ImpromptError
from imprompt.core.images import image_grid

PARTS = {"all": "", "down": "down_blocks.", "middle": "mid_block.", "up": "up_blocks."}
CELL_PX = 128
COLOURS = numpy.array([(12, 8, 60), (120, 28, 109), (237, 105, 37), (252, 255, 164)], numpy.float32)


class Explanation:
    """Filled by `generate(..., explanation=...)`: heat maps per image prompt, image and block."""

    def __init__(self) -> None:
        self.num_images = 0
        self.num_image_prompts: int | None = None
        """How many of the prompts are image prompts; persons follow. None: all are."""
        self._aspect = 1.0
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._counts: dict[tuple[int, str], Tensor] = {}

    def begin(self, num_images: int, height: int, width: int) -> None:
        """Forget what was recorded; so many images of this shape follow."""
        self.num_images, self._aspect = num_images, height / width
        self._sums.clear()
        self._counts.clear()

    def watch(
        self, condition: Mapping[str, Any], handle: Handle, prompt: int, rows: slice
    ) -> dict[str, Any]:
        """The same condition, reporting here: prompt number `prompt`, for these images.

        Raises:
            ImpromptError: attention processors of which only the result is known.
        """
        names = {site.index: site.name for site in handle.sites}
        sites: Mapping[int, SiteCondition] = condition[CONDITION_KEY]
        watched: dict[int, SiteCondition] = {}
        for index, site in sites.items():
            if not handle.processors[index].is_plain:
                raise ImpromptError(
                    f"{names[index]} has an attention processor that cannot be looked into: "
                    "remove the handles that are on the UNet, then call unet.set_attn_processor("
                    "diffusers.models.attention_processor.AttnProcessor2_0())."
                )
            record = self._recorder(prompt, names[index], rows)
            prompts: tuple[KeyValue, ...] = tuple(kv._replace(record=record) for kv in site.prompts)
            watched[index] = site._replace(prompts=prompts)
        return {**condition, CONDITION_KEY: watched}

    def _recorder(
        self, prompt: int, site_name: str, rows: slice
    ) -> Callable[[Tensor, Tensor], None]:
        batch = len(range(*rows.indices(self.num_images)))

        def record(text: Tensor, image: Tensor) -> None:
            # The conditional branch comes last in a batch stacked for guidance.
            text_norm, image_norm = (
                part[-batch:].float().transpose(1, 2).flatten(2).norm(dim=-1)
                for part in (text, image)
            )
            share = image_norm / (text_norm + image_norm).clamp(min=1e-12)
            key = (prompt, site_name)
            if key not in self._sums:
                # Where the attention is: a copy to the CPU at each site and step would be waited for.
                self._sums[key] = share.new_zeros(self.num_images, share.shape[1])
                self._counts[key] = torch.zeros(self.num_images, 1)
            self._sums[key][rows] += share
            self._counts[key][rows] += 1

        return record

    @property
    def prompts(self) -> list[int]:
        """Numbers of the image prompts that acted at all."""
        return sorted({prompt for prompt, _ in self._sums})

    def _name(self, prompt: int) -> str:
        if self.num_image_prompts is None or prompt < self.num_image_prompts:
            return f"prompt {prompt + 1}"
        return f"person {prompt - self.num_image_prompts + 1}"

    def heat_maps(
        self, prompt: int = 0, part: str = "", size_px: int = 64
    ) -> Float[Tensor, "images height width"]:
        """Share of an image prompt at each position, in [0, 1], mean over steps and sites.

        Args:
            prompt: its place among those that were given to `generate`, counted from 0.
            part: beginning of the names of the sites to look at ("up_blocks.", …); empty for all.
            size_px: of the longer side.

        Raises:
            ImpromptError: nothing was recorded for this prompt and part.
        """
        keys = [key for key in self._sums if key[0] == prompt and key[1].startswith(part)]
        if not keys:
            raise ImpromptError(
                f"Nothing was recorded of image prompt {prompt} at {part or 'any site'!r}: it did "
                "not act there."
            )
        height, width = (
            round(size_px * min(1.0, self._aspect)),
            round(size_px * min(1.0, 1 / self._aspect)),
        )
        maps: list[Tensor] = []
        for key in keys:
            mean = self._sums[key].cpu() / self._counts[key].clamp(min=1)
            grid = mean.unflatten(1, grid_of(mean.shape[1], self._aspect))
            maps.append(functional.interpolate(grid[:, None], (height, width), mode="bilinear"))
        return torch.stack(maps).mean(0)[:, 0]

    def sheet(self, images: Sequence[Image.Image]) -> Image.Image:
        """A row per image and prompt: the image, then where the prompt acted, overall and by part.

        In each column colours run from dark (its least) to yellow (its most); below stands the mean
        share of the attention that was the image prompt's.

        Raises:
            ImpromptError: no image prompt acted.
        """
        if not self.prompts:
            raise ImpromptError("No image prompt acted, so there is nothing to explain.")
        enlarged = max(1, CELL_PX // max(images[0].size))
        images = [
            image.resize(
                (image.width * enlarged, image.height * enlarged), Image.Resampling.NEAREST
            )
            for image in images
        ]
        by_cell = {
            (prompt, name): self.heat_maps(prompt, part, max(images[0].size))
            for prompt in self.prompts
            for name, part in PARTS.items()
            if any(key[0] == prompt and key[1].startswith(part) for key in self._sums)
        }
        columns = [name for name in PARTS if any(name == present for _, present in by_cell)]
        cells, labels = list[Image.Image](), list[str]()
        for number, image in enumerate(images):
            for prompt in self.prompts:
                cells.append(image)
                labels.append(self._name(prompt))
                for name in columns:
                    maps = [heat for (_, present), heat in by_cell.items() if present == name]
                    low = min(float(heat.min()) for heat in maps)
                    high = max(float(heat.max()) for heat in maps)
                    heat = by_cell.get((prompt, name))
                    if heat is None:
                        cells.append(Image.new("RGB", image.size, "white"))
                        labels.append("")
                    else:
                        cells.append(overlay(image, heat[number], low, high))
                        labels.append(f"{name} {float(heat[number].mean()):.0%}")
        return image_grid(cells, 1 + len(columns), labels)


def overlay(
    image: Image.Image, heat: Float[Tensor, "height width"], low: float, high: float
) -> Image.Image:
    """A heat map over the grey picture; `low` is shown dark and `high` yellow."""
    level = ((heat - low) / max(1e-9, high - low)).clamp(0, 1).numpy() * (len(COLOURS) - 1)
    before = numpy.minimum(level.astype(int), len(COLOURS) - 2)
    share = (level - before)[..., None]
    coloured = (1 - share) * COLOURS[before] + share * COLOURS[before + 1]
    heat_image = Image.fromarray(coloured.astype(numpy.uint8)).resize(image.size)
    return Image.blend(image.convert("L").convert("RGB"), heat_image, 0.6)
