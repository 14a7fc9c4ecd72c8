"""IP-Adapter: the base learns to read an image as it reads a text.

The frozen base predicts noise as ever; only the projection and K', V' at each cross-attention site
learn, from pairs of an image and its caption, with the image also as the prompt.

Source: Ye et al. (2308.06721), section 3.2; Plus and Full: the authors' published variants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter, create_adapter
from imprompt.adapters.projection import LinearProjection
from imprompt.bases import Base, TextStates, image_encoder_of
from imprompt.checkpoints import load_adapter, save_adapter
from imprompt.core.config import check_range, check_shares
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.core.tensor_files import write_tensors
from imprompt.data.rows import Rows
from imprompt.systems.denoising import (
    Denoising,
    check_same_encoders,
    drawn_shares,
    made_for,
    means_in_parts,
    replace_rows,
    sample_posterior,
    text_states_of,
)
from imprompt.systems.protocol import Figures
from imprompt.systems.warm_start import fit_to_captions

VARIANTS = ("base", "plus", "full")


@dataclass(frozen=True, kw_only=True)
class ImagePromptOptions:
    """What is trained. The defaults are the paper's."""

    variant: str = "base"
    """`base` (global image embedding), `plus` (resampler over patches) or `full` (all patches)."""
    num_tokens: int = 0
    """Tokens per image of a new adapter; 0 takes the variant's usual number (4 for base, 16 for plus)."""
    positions: bool = False
    """Whether the resampler of a new `plus` learns where in the picture each state of the image encoder
    stands. Not of the paper: CLIP ViT-H's states tell it, those of a small encoder may not."""
    drop_image: float = 0.05
    """Share of samples that see the text alone."""
    drop_text: float = 0.05
    """Share of samples that see the image alone."""
    drop_both: float = 0.05
    """Share of samples that see neither, for classifier-free guidance."""
    snr_gamma: float = 0.0
    """γ of min-SNR weighting (2303.09556); 0 weighs all timesteps alike, as the paper does."""
    start_from: str = ""
    """An adapter file to go on from; empty starts anew."""
    fit_to_captions: bool = False
    """Begin a new base variant with the projection that least squares fits to the captions."""

    def __post_init__(self) -> None:
        check_shares(self, ("drop_image", "drop_text", "drop_both"))
        check_range(self, ("num_tokens", "snr_gamma"), 0)


def build(options: ImagePromptOptions, base: Base, columns: Rows) -> ImagePromptSystem:
    """The system for prepared data: an adapter of the right shape, new or read from a file.

    Raises:
        ImpromptError: data of another base, an unknown variant, a base without image encoder.
    """
    if options.variant not in VARIANTS:
        raise ImpromptError(
            f"The variant {options.variant!r} is not trained here; choose {', '.join(VARIANTS)}."
        )
    check_same_encoders(columns, base)
    encoder = image_encoder_of(base)
    is_global = options.variant == "base"
    if options.start_from:
        adapter = load_adapter(options.start_from)
        if adapter.variant != options.variant:
            raise ImpromptError(
                f"{options.start_from} is a {adapter.variant} adapter; variant is {options.variant}."
            )
        if options.positions and adapter.projection.features[0].length is None:
            raise ImpromptError(
                f"{options.start_from} has no positions, and only a new adapter gets them here: set "
                "system.positions=false."
            )
    else:
        adapter = create_adapter(
            base.unet,
            options.variant,
            feature_dim=encoder.embed_dim if is_global else encoder.hidden_dim,
            num_tokens=options.num_tokens or None,
            num_positions=encoder.zero_hidden_states().shape[1] if options.positions else 0,
        )
        if options.fit_to_captions:
            if not isinstance(adapter.image_proj, LinearProjection):
                raise ImpromptError(
                    f"fit_to_captions works for the base variant; this is {options.variant}: --set "
                    "system.fit_to_captions=false."
                )
            fit_to_captions(adapter.image_proj, base, columns)
    dropped = torch.zeros(1, encoder.embed_dim) if is_global else encoder.zero_hidden_states()
    handle = adapter.to(base.device).install(base.unet)
    return ImagePromptSystem(
        base,
        adapter,
        lambda text_states, tokens: (text_states, handle.condition(tokens)),
        dropped_features={"image_embeds" if is_global else "hidden_states": dropped},
        options=options,
    )


# How tokens reach the denoiser: (text states, tokens) → (text states, condition).
Join = Callable[[TextStates, Tensor], tuple[TextStates, dict[str, Any] | None]]


class ImagePromptSystem:
    """Trains a module that turns image features into tokens, on cached columns."""

    rows_at_once: int | None = None

    def __init__(
        self,
        base: Base,
        module: Any,
        join: Join,
        *,
        dropped_features: Mapping[str, Tensor],
        options: ImagePromptOptions,
    ) -> None:
        """`module.tokens(*features)` makes tokens, `join` brings them to the denoiser.

        `dropped_features` are the columns that are read, each with what (1, …) stands for no image.
        """
        self.base = base
        self.module = module
        self.options = options
        self.columns = ("latent_mean", "latent_logvar", *dropped_features, "text_ids")
        self._join = join
        self.dropped_features = {
            name: dropped.float().to(base.device) for name, dropped in dropped_features.items()
        }
        self._empty_ids = base.tokenize([""]).to(base.device)
        self._denoising = Denoising(base.scheduler, base.device)

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        """Equation 6 of the paper, with conditions dropped per sample."""
        no_image, no_text = drops(randomness, self.options)
        timesteps = self._denoising.draw_timesteps(randomness)
        errors = self._errors(batch, randomness, timesteps, no_image, no_text)
        weights = self._denoising.weights(timesteps, self.options.snr_gamma)
        return (weights * errors).mean(), {}

    def _errors(
        self,
        batch: dict[str, Tensor],
        randomness: Randomness,
        timesteps: Tensor,
        no_image: Tensor,
        no_text: Tensor,
    ) -> Tensor:
        """The squared error of each sample's prediction, (batch,)."""
        features = [
            replace_rows(batch[name].float(), dropped, no_image)
            for name, dropped in self.dropped_features.items()
        ]
        tokens = self.module.tokens(*features)
        text_ids = replace_rows(batch["text_ids"], self._empty_ids, no_text)
        text_states = text_states_of(self.base, text_ids, batch)
        text_states, condition = self._join(text_states, tokens)
        return self._denoising.errors(
            lambda noisy: self.base.denoise(noisy, timesteps, text_states, condition),
            sample_posterior(batch, randomness, self.base),
            randomness,
            timesteps,
        )

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """The loss at evenly spread timesteps on fixed noise, without text: what the image tells.

        With the text the image adds little that a caption does not say, so a gap shows best here.
        """
        count = len(batch["text_ids"])
        timesteps = self._denoising.spread_timesteps(count)
        never = torch.zeros(count, dtype=torch.bool, device=timesteps.device)
        always = ~never
        asked = {
            "loss_with_image": (self._errors, batch, never, always),
            "loss_without_image": (self._errors, batch, always, always),
            "loss_with_image_and_text": (self._errors, batch, never, never),
            "loss_with_text": (self._errors, batch, always, never),
        }
        return means_in_parts(asked, randomness, timesteps, rows_at_once=self.rows_at_once)

    def export(self, path: Path) -> None:
        """Write what was trained as one safetensors file; an adapter with the official keys."""
        metadata = made_for(self.base)
        if isinstance(self.module, ImagePromptAdapter):
            save_adapter(self.module, path, metadata)
        else:
            write_tensors(self.module.state_dict(), path, metadata)


def drops(randomness: Randomness, options: ImagePromptOptions) -> tuple[Tensor, Tensor]:
    """Which samples lose their image, and which their text: two masks (batch,).

    One draw decides between the three cases, so their shares add up as they do in the paper.
    """
    only_image, only_text, both = drawn_shares(
        randomness.uniform("drop"), (options.drop_image, options.drop_text, options.drop_both)
    )
    return only_image | both, only_text | both
