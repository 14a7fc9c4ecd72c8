"""Controls: maps that a generated picture obeys, and what they add at each step of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.adapters.preparation import check_mask_fits
from imprompt.adapters.sites import Number
from imprompt.bases import Base, Residuals, TextStates
from imprompt.bases.latent_space import height_and_width
from imprompt.checkpoints import LoadedControl
from imprompt.checkpoints.controls import CLASSES
from imprompt.core.errors import ImpromptError
from imprompt.generation.conditions import Branch, check_finite, check_time_span, rows_of
from imprompt.generation.features import ImageLike, pixels_of_image_like
from imprompt.generation.masks import mask_to_tensor
from imprompt.systems.control import as_read
from imprompt.systems.controlnet import check_controlnet, control_residuals
from imprompt.systems.t2i_adapter import adapter_residuals, check_t2i_adapter


@dataclass(frozen=True, eq=False)
class Control:
    """A map that pictures shall obey, and the network that reads it.

    Args:
        image: a file, a PIL image or pixels (3, height, width) in [-1, 1]; one for each picture of
            the generation may be given as a list. It is stretched to the picture's size.
        model: what `load_control` reads: a ControlNet or a T2I-Adapter of any diffusers folder; or
            such a network itself.
        weight: ω, how much of what the network adds is added; 0 is nothing at no cost.
        start, end: the fraction of the steps in which it acts.
        mask: where it acts: white there, black elsewhere, of the picture's shape; see `ImagePrompt`.

    Raises:
        ImpromptError: start and end are no time span, the weight is not finite, or the model is no such network.

    Source: ControlNet (2302.05543) section 3.4; T2I-Adapter (2302.08453) section 3.5, eq. 7 (ω).
    """

    image: ImageLike | Sequence[ImageLike]
    model: Any
    _: KW_ONLY
    weight: Number = 1.0
    start: Number = 0.0
    end: Number = 1.0
    mask: ImageLike | None = None

    def __post_init__(self) -> None:
        check_time_span(self.start, self.end)
        check_finite(weight=self.weight)
        if not any(kind.__name__ in CLASSES for kind in type(self.network).__mro__):
            raise ImpromptError(
                f"A control's model is a {type(self.network).__name__}; needed is what "
                f"imprompt.load_control reads, or a {' or '.join(CLASSES)} of diffusers."
            )

    @property
    def network(self) -> Any:
        """A diffusers `ControlNetModel` or `T2IAdapter`."""
        return self.model.module if isinstance(self.model, LoadedControl) else self.model


@dataclass(frozen=True, eq=False, kw_only=True)
class MapControl:
    """A control as the denoising loop needs it.

    `maps` are one for all pictures of a generation or one for each, RGB (or grey, for a T2I-Adapter
    that reads such) in [0, 1]. A ControlNet reads
    the text as the denoiser does, unless `tokens` (and `zero_tokens` for the unconditional half) stand
    in its place, one for all pictures or one for each, as an IdentityNet wants.
    """

    module: Any
    maps: Float[Tensor, "images channels height width"]
    weight: Number = 1.0
    start: Number = 0.0
    end: Number = 1.0
    tokens: Float[Tensor, "images tokens dim"] | None = None
    zero_tokens: Float[Tensor, "one tokens dim"] | None = None
    mask: Float[Tensor, "mask_height mask_width"] | None = None

    def is_active(self, step: int, num_steps: int) -> bool:
        """Whether it acts at this step, counted from 0."""
        return self.weight != 0 and self.start <= step / num_steps < self.end

    @property
    def is_controlnet(self) -> bool:
        """Whether it reads the noisy latents, too, and must be run at every step."""
        return hasattr(self.module, "controlnet_cond_embedding")

    @property
    def is_conditional(self) -> bool:
        """Whether nothing of it may reach the unconditional branch. So it is with ControlNets that tell of the
        whole picture, as the published one for shuffled pictures; guidance would undo what they say."""
        return bool(self.module.config.get("global_pool_conditions"))


def map_control(control: Control, base: Base, size_px: int | tuple[int, int] | None) -> MapControl:
    """A control whose maps are read and stretched to the size of the pictures.

    Raises:
        ImpromptError: a map cannot be read, or the network does not fit the base.
    """
    check_fits(control.network, base)
    sides = height_and_width(size_px, base.image_size_px)
    is_list = isinstance(control.image, Sequence) and not isinstance(control.image, str)
    images: Sequence[Any] = control.image if is_list else [control.image]  # type: ignore[assignment]
    pixels = [
        torch.nn.functional.interpolate(
            pixels_of_image_like(image)[None], sides, mode="bilinear", antialias=True
        )
        for image in images
    ]
    maps = ((torch.cat(pixels) + 1) / 2).clamp(0, 1)
    return MapControl(
        module=placed(control.network, base, is_own=isinstance(control.model, LoadedControl)),
        maps=as_read(control.network, maps),
        weight=control.weight,
        start=control.start,
        end=control.end,
        mask=None if control.mask is None else mask_to_tensor(control.mask),
    )


def placed(network: Any, base: Base, *, is_own: bool = True) -> Any:
    """A control's network where the base computes and in its precision, and it stays there.

    One that is not our own, but the caller's, perhaps still to be trained, is rounded in a copy.
    """
    if not is_own and network.dtype != base.dtype:
        network = deepcopy(network)
    # Not with diffusers' own `to`, which remarks on modules that it keeps in float32: none.
    return nn.Module.to(network, device=base.device, dtype=base.dtype)


def check_fits(network: Any, base: Base) -> None:
    """Raise an ImpromptError if a network's shape is another than the base's denoiser's."""
    if hasattr(network.config, "adapter_type"):
        check_t2i_adapter(network, base)
    else:
        check_controlnet(network, base)


class ControlRun:
    """The controls of one batch: what they add, step by step."""

    def __init__(
        self,
        controls: Sequence[MapControl],
        base: Base,
        branches: Sequence[Branch],
        rows: slice,
        num_images: int,
        num_steps: int,
        text_states: TextStates,
    ) -> None:
        """`rows` says which pictures of the generation the batch has; `text_states` are stacked for
        the `branches`.

        Raises:
            ImpromptError: a control has maps for another number of pictures.
        """
        self._base, self._num_steps = base, num_steps
        self._controls = [
            control
            for control in controls
            if any(control.is_active(step, num_steps) for step in range(num_steps))
        ]
        self._maps = [
            rows_of(control.maps, rows, num_images, "A control has maps")
            .to(base.device, base.dtype)
            .repeat(len(branches), 1, 1, 1)
            for control in self._controls
        ]
        self._where = [_where(control, branches, maps) for control, maps in self._with_maps()]
        self._states = [
            _states(control, branches, rows, num_images, text_states) for control in self._controls
        ]
        # What does not depend on the noise is computed here, once.
        self._constant: dict[int, Residuals] = {
            number: self._within(number, adapter_residuals(control.module, maps) * control.weight)
            for number, (control, maps) in enumerate(self._with_maps())
            if not control.is_controlnet
        }

    def _with_maps(self) -> list[tuple[MapControl, Tensor]]:
        return list(zip(self._controls, self._maps, strict=True))

    def _within(self, number: int, residuals: Residuals) -> Residuals:
        where = self._where[number]
        return residuals if where is None else residuals.within(where)

    def residuals(self, latents: Tensor, timestep: Tensor, step: int) -> Residuals | None:
        """What all controls that act at this step add for latents as the denoiser sees them."""
        parts: list[Residuals] = []
        for number, control in enumerate(self._controls):
            if not control.is_active(step, self._num_steps):
                continue
            parts.append(
                self._constant[number]
                if number in self._constant
                else self._within(
                    number,
                    control_residuals(
                        control.module,
                        self._base,
                        latents,
                        timestep,
                        self._states[number],
                        self._maps[number],
                        control.weight,
                    ),
                )
            )
        return Residuals.sum(parts) if parts else None


def _where(control: MapControl, branches: Sequence[Branch], maps: Tensor) -> Tensor | None:
    """How much of what a control adds counts, (stacked rows, 1, height, width); None is all of it everywhere."""
    if control.mask is None and not control.is_conditional:
        return None
    mask = torch.ones(1, 1) if control.mask is None else control.mask
    if control.mask is not None:
        check_mask_fits(control.mask, (maps.shape[-2], maps.shape[-1]))
    rows_each = len(maps) // len(branches)
    counts = [float(b != "unconditional" or not control.is_conditional) for b in branches]
    of_rows = torch.tensor(counts).repeat_interleave(rows_each)[:, None, None, None]
    return (of_rows * mask).to(maps)


def _states(
    control: MapControl,
    branches: Sequence[Branch],
    rows: slice,
    num_images: int,
    text_states: TextStates,
) -> TextStates:
    if control.tokens is None:
        return text_states
    tokens = rows_of(control.tokens, rows, num_images, "A control has tokens")
    zero = tokens if control.zero_tokens is None else control.zero_tokens.expand_as(tokens)
    stacked = [zero if branch == "unconditional" else tokens for branch in branches]
    sequence = torch.cat(stacked).to(text_states.sequence)
    return TextStates(sequence, text_states.pooled, text_states.framing)
