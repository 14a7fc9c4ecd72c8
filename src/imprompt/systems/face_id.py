"""Face-id: an image prompt that is a person's identity vector, with low-rank additions to the base.

As IP-Adapter, but what is read is who a face encoder saw in another picture of the person. Beside K',
V' every attention layer learns a LoRA, for the base alone draws faces too much alike.

Source: the face-id variants of IP-Adapter (2308.06721) as its authors published them: rank 128, the
second generation of face-id-plus with its shortcut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from imprompt.adapters import ImagePromptAdapter, create_adapter
from imprompt.adapters.projection import FacePlusProjection
from imprompt.bases import Base, image_encoder_of
from imprompt.checkpoints import load_adapter
from imprompt.core.config import check_left_alone, check_range
from imprompt.core.errors import ImpromptError
from imprompt.data.rows import Rows
from imprompt.systems.denoising import check_same_encoders
from imprompt.systems.faces import learn_faces_of
from imprompt.systems.image_prompt import ImagePromptOptions, ImagePromptSystem

FEATURES: dict[str, tuple[str, ...]] = {
    "faceid": ("id_embeds",),
    "faceid-plus": ("id_embeds", "reference_hidden_states"),
}


@dataclass(frozen=True, kw_only=True)
class FaceIdOptions(ImagePromptOptions):
    """What is trained. The defaults are those of the published adapters."""

    variant: str = "faceid"
    """`faceid` (identity vector) or `faceid-plus` (with it the patches of the face)."""
    lora_rank: int = 128
    """Of the low-rank additions at every attention layer of a new adapter; `start_from` keeps its own."""
    shortcut: bool | None = None
    """Second generation of `faceid-plus`: tokens of the identity are added to the refined ones. By default as
    `start_from` has it, and off for a new adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ("lora_rank",), 1)
        check_left_alone(self, ("positions",), "a face's features have no places in a picture")


def build(options: FaceIdOptions, base: Base, columns: Rows) -> ImagePromptSystem:
    """The system for prepared data: `imprompt prepare … --variant faceid` or `faceid-plus`.

    Raises:
        ImpromptError: data of another base or without faces, another variant, a start that does not
            fit, fit_to_captions.
    """
    if options.variant not in FEATURES:
        raise ImpromptError(
            f"The variant {options.variant!r} reads no faces; choose {', '.join(FEATURES)}."
        )
    if options.fit_to_captions:
        raise ImpromptError("Captions do not tell who is seen: fit_to_captions=false.")
    check_same_encoders(columns, base)
    names = FEATURES[options.variant]
    columns.require(names)
    if options.start_from:
        adapter = load_adapter(options.start_from)
        if adapter.variant != options.variant:
            raise ImpromptError(
                f"{options.start_from} is a {adapter.variant} adapter; variant is {options.variant}."
            )
    else:
        first = columns.rows([0], names)
        adapter = create_adapter(
            base.unet,
            options.variant,
            feature_dim=first[names[-1]].shape[-1],
            id_dim=first["id_embeds"].shape[-1],
            num_tokens=options.num_tokens or None,
            lora_rank=options.lora_rank,
        )
    _set_shortcut(adapter, options)
    learn_faces_of(adapter, columns, options.start_from)
    dropped = {"id_embeds": torch.zeros(1, adapter.projection.features[0].dim)}
    if options.variant == "faceid-plus":
        dropped["reference_hidden_states"] = image_encoder_of(base).zero_hidden_states()
    handle = adapter.to(base.device).install(base.unet)
    return ImagePromptSystem(
        base,
        adapter,
        lambda text_states, tokens: (text_states, handle.condition(tokens)),
        dropped_features=dropped,
        options=options,
    )


def _set_shortcut(adapter: ImagePromptAdapter, options: FaceIdOptions) -> None:
    projection = adapter.image_proj
    if options.shortcut is None:
        return
    if not isinstance(projection, FacePlusProjection):
        if options.shortcut:
            raise ImpromptError(f"The variant {options.variant} has no shortcut; faceid-plus has.")
        return
    if options.start_from and projection.shortcut != options.shortcut:
        raise ImpromptError(
            f"{options.start_from} is of the {'second' if projection.shortcut else 'first'} generation, "
            f"which shortcut={str(options.shortcut).lower()} is not: leave it out."
        )
    projection.shortcut = options.shortcut
