"""What controls add inside a denoising UNet: a seam that ControlNets and T2I-Adapters share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


@dataclass(frozen=True, eq=False)
class Residuals:
    """Maps (batch, channels, h, w) to add within a UNet, as diffusers' UNets take them.

    A ControlNet gives `skips` (added to every skip connection) and `middle` (to the middle block's
    output); a T2I-Adapter gives `encoder` (added to the features of each scale of the encoder).
    """

    skips: tuple[Tensor, ...] = ()
    middle: Tensor | None = None
    encoder: tuple[Tensor, ...] = ()

    def __mul__(self, weight: int | float) -> Residuals:
        return Residuals(
            tuple(one * weight for one in self.skips),
            None if self.middle is None else self.middle * weight,
            tuple(one * weight for one in self.encoder),
        )

    def within(self, mask: Float[Tensor, "batch 1 height width"]) -> Residuals:
        """The same where a mask in [0, 1] of the picture's shape says so, and nothing elsewhere."""

        def masked(one: Tensor) -> Tensor:
            size = (one.shape[-2], one.shape[-1])
            return one * adaptive_avg_pool2d(mask, size).to(one)

        return Residuals(
            tuple(masked(one) for one in self.skips),
            None if self.middle is None else masked(self.middle),
            tuple(masked(one) for one in self.encoder),
        )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for one call of a `UNet2DConditionModel`."""
        given: dict[str, Any] = {}
        if self.middle is not None:
            given["down_block_additional_residuals"] = self.skips
            given["mid_block_additional_residual"] = self.middle
        if self.encoder:
            # A fresh list, since the UNet takes it apart.
            given["down_intrablock_additional_residuals"] = list(self.encoder)
        return given

    @staticmethod
    def sum(parts: Sequence[Residuals]) -> Residuals:
        """What several controls add together (no parts: nothing)."""
        middles = [part.middle for part in parts if part.middle is not None]
        return Residuals(
            _sums([part.skips for part in parts if part.skips]),
            None if not middles else _sums([(one,) for one in middles])[0],
            _sums([part.encoder for part in parts if part.encoder]),
        )


def _sums(lists: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    if not lists:
        return ()
    total = lists[0]
    for more in lists[1:]:
        total = tuple(a + b for a, b in zip(total, more, strict=True))
    return total
