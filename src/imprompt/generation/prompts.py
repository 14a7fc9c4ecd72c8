"""Image prompts as users write them, and their way to tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from imprompt.adapters import Handle, ImagePromptAdapter
from imprompt.adapters.site_presets import preset_scales
from imprompt.adapters.sites import Number, Scale
from imprompt.bases import ClipImageEncoder
from imprompt.checkpoints.identity import reads_faces
from imprompt.core.errors import ImpromptError
from imprompt.encoders.face import FaceEncoder
from imprompt.generation.conditions import (
    TokenPrompt,
    check_finite,
    check_over_time,
    check_time_span,
    is_zero,
)
from imprompt.generation.faces import (
    face_encoder_of,
    face_features,
    face_features_of_nothing,
)
from imprompt.generation.features import (
    CROPS,
    MERGES,
    ImageFeatures,
    ImageLike,
    check_image_like,
    encoded,
    is_features_file,
    merge_features,
)
from imprompt.generation.instructed import Words, instructed_tokens
from imprompt.generation.masks import mask_to_tensor


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """A picture that says what to draw, with the adapter that makes it understood.

    Raises:
        ImpromptError: no image, a time span that is none, numbers that are not finite, or settings that
            exclude each other.
    """

    image: ImageLike | ImageFeatures | Sequence[ImageLike]
    """A file, a PIL image, an array as PIL's (height, width, 3) of uint8, or pixels (3, height,
    width) in [-1, 1]; or several of them (see `merge`); or kept features, as `ImageFeatures` or as the file they were saved in."""

    adapter: ImagePromptAdapter = field(kw_only=True, repr=False)
    """What was trained (or loaded) for the base that generates."""

    scale: Scale = field(default=1.0, kw_only=True)
    """λ, the weight beside the text: one number, one per cross-attention site, or a mapping from
    parts of the UNet ("up", "mid_block", …) to numbers. 0 costs nothing and does nothing (but see
    `lora_scale`). Parts that a mapping does not list have 1; in diffusers' nested form, {"up":
    {"block_0": [0.0, 1.0, 0.0]}}, they have 0, as in diffusers. See
    `imprompt.adapters.sites.scale_per_site`."""

    site_preset: str | None = field(default=None, kw_only=True)
    """How `scale`, then one number, is spread over the UNet: "style", "composition", … (see
    `imprompt.adapters.site_presets`)."""

    mask: ImageLike | None = field(default=None, kw_only=True, repr=False)
    """Where it acts: white there, black elsewhere. A tensor is (height, width) in [0, 1], an
    array that or of uint8 up to 255."""

    start: Number = field(default=0.0, kw_only=True)
    """When it begins to act, as a fraction of the steps."""

    end: Number = field(default=1.0, kw_only=True)
    """When it no longer acts, as a fraction of the steps."""

    over_time: Sequence[Number] = field(default=(1.0,), kw_only=True)
    """Factors on `scale`, spread evenly from start to end and interpolated: (1, 0) fades out."""

    merge: str = field(default="concat", kw_only=True)
    """How several images become one prompt; see `imprompt.generation.features.merge_features`. With "each" they
    do not: there are as many as a generation draws, and each reads its own."""

    image_weights: Sequence[Number] | None = field(default=None, kw_only=True)
    """One weight for each of several images."""

    crop: str = field(default="center", kw_only=True)
    """What the encoder sees of an image that is not square: "center", "pad", "stretch", "tiles"."""

    instruction: str | None = field(default=None, kw_only=True)
    """What to take from the image ("use the style", "use the duck"), for Instruct adapters, which
    take everything if they are not told."""

    negative: ImageLike | ImageFeatures | None = field(default=None, kw_only=True, repr=False)
    """A picture to get away from, where otherwise no picture stands in guidance."""

    face_encoder: FaceEncoder | str | None = field(default=None, kw_only=True, repr=False)
    """Who reads the face, for adapters that read identity vectors: by default the encoder that the
    adapter was trained with; for one that does not tell, what its published kind reads."""

    lora_scale: Number = field(default=1.0, kw_only=True)
    """Weight of a face-id adapter's LoRA, which acts from start to end whatever `scale` is; 0 is
    without it. Of several prompts of one adapter it acts once, with the first one's weight."""

    shortcut_scale: Number = field(default=1.0, kw_only=True)
    """How much the face's looks count beside its identity, for face-id-plus adapters of the second
    generation (the authors' `s_scale`)."""

    def __post_init__(self) -> None:
        check_time_span(self.start, self.end)
        check_over_time(self.over_time)
        for name, chosen, known in (("merge", self.merge, MERGES), ("crop", self.crop, CROPS)):
            if chosen not in known:
                raise ImpromptError(f"There is no {name} {chosen!r}; choose {', '.join(known)}.")
        check_finite(lora_scale=self.lora_scale, shortcut_scale=self.shortcut_scale)
        if isinstance(self.scale, int | float):
            check_finite(scale=self.scale)
        if not isinstance(self.image, ImageFeatures) and not self.images:
            raise ImpromptError("An image prompt without an image was given: give one or more.")
        for image in self.images:
            check_image_like(image)
        if not isinstance(self.adapter, ImagePromptAdapter):
            raise ImpromptError(
                f"An image prompt's adapter is a {type(self.adapter).__name__}; an adapter is "
                "needed, as imprompt.load_adapter and imprompt.create_adapter return it."
            )
        if self.instruction is not None and self.adapter.variant != "instruct":
            raise ImpromptError(
                f"The {self.adapter.variant} adapter cannot be told {self.instruction!r}: only "
                "Instruct adapters read instructions."
            )
        if self.lora_scale != 1 and not self.adapter.lora_rank:
            raise ImpromptError(
                f"The {self.adapter.variant} adapter brings no LoRA that a lora_scale could weigh: "
                "only face-id adapters do."
            )
        if self.shortcut_scale != 1 and not getattr(self.adapter.image_proj, "shortcut", False):
            raise ImpromptError(
                f"The {self.adapter.variant} adapter has no shortcut that a shortcut_scale could "
                "weigh: only face-id-plus adapters of the second generation do."
            )
        if self.site_preset is not None and not isinstance(self.scale, int | float):
            raise ImpromptError("With a site_preset the scale is one number, which it spreads.")
        if self.image_weights is not None and self.crop == "tiles":
            raise ImpromptError("Images cut into tiles cannot be weighted: use another crop.")
        if self.merge == "each" and (self.image_weights is not None or self.crop == "tiles"):
            raise ImpromptError("With merge='each' images have neither image_weights nor tiles.")

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """The image or images, always as a tuple; none where features were given."""
        if isinstance(self.image, ImageFeatures):
            return ()
        if isinstance(self.image, Sequence) and not isinstance(self.image, str):
            return tuple(self.image)
        return (cast(ImageLike, self.image),)

    @property
    def is_effective(self) -> bool:
        """Whether it acts at any step at all, with its tokens or with its LoRA."""
        brings_lora = self.lora_scale != 0 and self.adapter.lora_rank > 0
        acts = brings_lora or (not is_zero(self.scale) and any(self.over_time))
        return acts and self.start < self.end


@contextmanager
def installed(
    unet: nn.Module, adapters: Sequence[ImagePromptAdapter]
) -> Iterator[dict[ImagePromptAdapter, Handle]]:
    """Handles of adapters on a UNet for as long as the block runs, whatever ends it.

    Handles that others hold on the same UNet stay as they are.
    """
    handles: dict[ImagePromptAdapter, Handle] = {}
    try:
        for adapter in adapters:
            if adapter not in handles:
                handles[adapter] = adapter.install(unet)
        yield handles
    finally:
        for handle in reversed(handles.values()):
            handle.remove()


def token_prompt(
    prompt: ImagePrompt,
    handle: Handle,
    encoder: ClipImageEncoder | None,
    words: Words | None = None,
    number: int | None = None,
    *,
    is_guided: bool = True,
) -> TokenPrompt:
    """Encodes and projects a prompt's images; Instruct adapters need the `words` beside them.

    `number` is what an explanation calls it. Where nothing is guided, what stands for no picture is
    not asked for, and there are no `zero_tokens`.

    Raises:
        ImpromptError: an image cannot be read, or the adapter does not read what the encoder gives.
    """
    adapter = prompt.adapter
    read = _read_faces if reads_faces(adapter) else _read_images
    given, against = read(prompt, encoder, is_guided)
    features = [merge_features(v, prompt.merge, prompt.image_weights) for v in given]
    scale = prompt.scale
    if prompt.site_preset is not None and isinstance(scale, int | float):
        cross_sites = [site for site in handle.sites if site.is_cross]
        scale = preset_scales(prompt.site_preset, cross_sites, scale)
    tokens: dict[str, Any]
    if adapter.variant == "instruct":
        if words is None:
            raise ImpromptError("An Instruct adapter reads the text too: draw with generate().")
        nothing = None if against is None else against[0]
        is_each = prompt.merge == "each"
        made = instructed_tokens(
            adapter, features[0], nothing, prompt.instruction, words, is_each=is_each
        )
        tokens = {
            "tokens": made.full,
            "zero_tokens": made.nothing,
            "image_only_tokens": made.image_only,
            "uninstructed_tokens": made.uninstructed,
        }
    else:
        options: dict[str, float] = {}
        if adapter.variant == "faceid-plus":
            options["shortcut_scale"] = float(prompt.shortcut_scale)
        made = adapter.tokens(*features, **options)
        nothing = None if against is None else adapter.tokens(*against, **options)
        if prompt.merge != "each":
            # Several images are one prompt: the attention reads the tokens of all of them.
            nothing = None if nothing is None else nothing.repeat(1, len(made), 1)
            made = made.flatten(0, 1)[None]
        tokens = {"tokens": made, "zero_tokens": nothing}
    return TokenPrompt(
        handle=handle,
        number=number,
        **tokens,
        scale=scale,
        mask=None if prompt.mask is None else mask_to_tensor(prompt.mask)[None],
        start=prompt.start,
        end=prompt.end,
        over_time=prompt.over_time,
        lora_scale=prompt.lora_scale,
    )


def _read_images(
    prompt: ImagePrompt, encoder: ClipImageEncoder | None, is_guided: bool
) -> tuple[list[Tensor], list[Tensor] | None]:
    """What the adapter reads of the pictures, and of what to get away from, if anything is guided."""
    _check_adapter_reads_images(prompt.adapter)
    given = prompt.image if isinstance(prompt.image, ImageFeatures) else prompt.images
    features, kept_zero = _features(given, prompt, encoder)
    if prompt.negative is None:
        if not is_guided:
            return [features], None
        return [features], [_features_of_nothing(features, kept_zero, prompt, encoder)]
    negative = prompt.negative
    negative = negative if isinstance(negative, ImageFeatures) else (negative,)
    return [features], [_features(negative, prompt, encoder)[0].mean(0, keepdim=True)]


def _read_faces(
    prompt: ImagePrompt, encoder: ClipImageEncoder | None, is_guided: bool
) -> tuple[list[Tensor], list[Tensor] | None]:
    """The same of an adapter that reads identity vectors."""
    if prompt.merge not in ("concat", "each") and prompt.adapter.variant == "faceid-plus":
        raise ImpromptError("Faces for faceid-plus are merged by concat only.")
    faces = face_encoder_of(prompt.adapter, prompt.face_encoder)
    if isinstance(prompt.image, ImageFeatures) or isinstance(prompt.negative, ImageFeatures):
        raise ImpromptError("A face is given as a picture: kept features are of image encoders.")
    given = face_features(prompt.adapter, prompt.images, faces, encoder)
    if prompt.negative is None:
        return given, face_features_of_nothing(prompt.adapter, encoder) if is_guided else None
    return given, face_features(prompt.adapter, [prompt.negative], faces, encoder)


def _check_adapter_reads_images(adapter: ImagePromptAdapter) -> None:
    wanted = [feature.name for feature in adapter.projection.features]
    if adapter.variant != "instruct" and wanted not in (["image_embeds"], ["hidden_states"]):
        raise ImpromptError(
            f"The {adapter.variant} adapter reads {', '.join(wanted)}; from an image alone only "
            "image_embeds or hidden_states can be had (the variants base, plus, full and instruct)."
        )


def _features(
    given: ImageFeatures | Sequence[ImageLike],
    prompt: ImagePrompt,
    encoder: ClipImageEncoder | None,
) -> tuple[Tensor, Tensor | None]:
    """What the adapter reads of pictures, a row for each (or for each of its tiles).

    Of kept features also what was kept for no picture.
    """
    wanted = prompt.adapter.projection.features[0]
    if not isinstance(given, ImageFeatures) and all(is_features_file(image) for image in given):
        kept = [ImageFeatures.load(str(image)) for image in given]
        for part in kept:
            _check_kept(part, wanted.name, wanted.dim, encoder)
        zeros = [part.zero_values for part in kept if part.zero_values is not None]
        return torch.cat([part.values for part in kept]), zeros[0] if zeros else None
    if isinstance(given, ImageFeatures):
        _check_kept(given, wanted.name, wanted.dim, encoder)
        return given.values, given.zero_values
    encoder = _encoder_for(prompt.adapter, encoder)
    return encoded(encoder, given, wanted.name, prompt.crop), None


def _check_kept(kept: ImageFeatures, name: str, dim: int, encoder: ClipImageEncoder | None) -> None:
    if kept.name != name or kept.values.shape[-1] != dim:
        raise ImpromptError(
            f"The features kept are {kept.name} of {kept.values.shape[-1]} numbers, but the adapter "
            f"reads {name} of {dim}: encode the images again for this adapter."
        )
    if encoder is not None and kept.encoder_fingerprint != encoder.fingerprint():
        raise ImpromptError(
            "The features kept come from another image encoder than this base's: encode the images "
            "again, or give generate() the encoder they came from."
        )


def _encoder_for(adapter: ImagePromptAdapter, encoder: ClipImageEncoder | None) -> ClipImageEncoder:
    wanted = adapter.projection.features[0]
    if encoder is None:
        raise ImpromptError(
            "This base brings no image encoder: give generate() the one that the adapter was "
            "trained with, image_encoder=load_clip(...), or --image-encoder on the command line."
        )
    encoder_dim = encoder.hidden_dim if wanted.is_sequence else encoder.embed_dim
    if encoder_dim != wanted.dim:
        raise ImpromptError(
            f"The {adapter.variant} adapter reads {wanted.name} of {wanted.dim} numbers, but "
            f"the image encoder gives {encoder_dim}: it was trained with another encoder."
        )
    return encoder


def _features_of_nothing(
    features: Tensor,
    kept_zero: Tensor | None,
    prompt: ImagePrompt,
    encoder: ClipImageEncoder | None,
) -> Tensor:
    """What stands for no picture, as in training: see the paper's variants."""
    if not prompt.adapter.projection.features[0].is_sequence:
        return torch.zeros_like(features[:1])
    if kept_zero is not None:
        return kept_zero
    is_kept = isinstance(prompt.image, ImageFeatures) or all(map(is_features_file, prompt.images))
    if encoder is None and is_kept:
        raise ImpromptError(
            "The features kept do not say what stands for no picture, which guidance needs: give "
            "generate() the image encoder they came from, or encode the images again."
        )
    return _encoder_for(prompt.adapter, encoder).zero_hidden_states()
