"""A person to keep: one picture says who, five landmarks say where the face shall be."""

from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from imprompt.adapters import Handle
from imprompt.adapters.sites import Number, Scale
from imprompt.bases import Base, ClipImageEncoder
from imprompt.bases.latent_space import height_and_width
from imprompt.checkpoints.identity import Identity
from imprompt.core.errors import ImpromptError
from imprompt.encoders.face import FaceEncoder
from imprompt.encoders.landmarks import (
    checked_places,
    landmark_images,
    landmarks_at_size,
    read_landmarks,
)
from imprompt.generation.conditions import TokenPrompt, check_finite, check_time_span, is_zero
from imprompt.generation.controls import MapControl
from imprompt.generation.faces import face_encoder_of, face_features, face_features_of_nothing
from imprompt.generation.features import ImageLike, pixels_of_image_like
from imprompt.generation.masks import mask_to_tensor

Landmarks = Tensor | str | PathLike[str]


@dataclass(frozen=True, eq=False)
class IdentityPrompt:
    """A picture of a person who shall be drawn, and what keeps the likeness.

    Raises:
        ImpromptError: start and end are no time span, a weight is not finite, or landmarks of another shape or in pixels.

    Source: InstantID (2401.07519), section 3.
    """

    image: ImageLike
    """A file, a PIL image, or pixels (3, height, width) in [-1, 1]."""

    identity: Identity
    """Adapter and IdentityNet, as `load_identity` reads them."""

    landmarks: Landmarks | None = None
    """Where eyes, nose and mouth shall be, as fractions of width and height: one face for all pictures
    or one for each, or a file (see `read_landmarks`). By default where they are in `image` when it is
    cut to the pictures' shape (see `landmarks_at_size`)."""

    scale: Scale | None = None
    """λ, the weight of the face beside the text; see `ImagePrompt`. 0 is without adapter. By default the
    identity's own weight: 0.8 as published, 1 for what is trained here."""

    net_weight: Number | None = None
    """How much of what IdentityNet adds is added; 0 is without it. By default as `scale`."""

    start: Number = 0.0
    end: Number = 1.0
    face_encoder: FaceEncoder | str | None = None
    """Who reads the face; see `ImagePrompt`."""

    mask: ImageLike | None = None
    """Where the person acts, beside the text and in IdentityNet: white there, black elsewhere. With one for each,
    several persons in one picture stay apart."""

    def __post_init__(self) -> None:
        check_time_span(self.start, self.end)
        if not isinstance(self.identity, Identity):
            raise ImpromptError(
                f"A person's identity is a {type(self.identity).__name__}; what imprompt.load_identity reads "
                "is needed."
            )
        if self.net_weight is not None:
            check_finite(net_weight=self.net_weight)
        if isinstance(self.scale, int | float):
            check_finite(scale=self.scale)
        if isinstance(self.landmarks, Tensor):
            if self.landmarks.shape[1:] != (5, 2):
                raise ImpromptError(
                    f"landmarks have shape {tuple(self.landmarks.shape)}; (images, 5, 2) is needed."
                )
            checked_places(self.landmarks, "IdentityPrompt")

    @property
    def used_scale(self) -> Scale:
        """λ, given or not."""
        return self.identity.weight if self.scale is None else self.scale

    @property
    def used_net_weight(self) -> Number:
        """IdentityNet's weight, given or not."""
        return self.identity.weight if self.net_weight is None else self.net_weight

    @property
    def is_beside_the_text(self) -> bool:
        """Whether the adapter acts at any step."""
        return not is_zero(self.used_scale) and self.start < self.end

    @property
    def is_in_the_net(self) -> bool:
        """Whether IdentityNet acts at any step."""
        return self.used_net_weight != 0 and self.start < self.end


@dataclass(frozen=True, eq=False)
class Person:
    """A person as the denoising loop needs one; None is what does not act."""

    prompt: TokenPrompt | None
    """The face's tokens beside the text."""
    control: MapControl | None
    """IdentityNet, which reads the landmarks, and the face's tokens instead of the text."""


def read_person(
    prompt: IdentityPrompt,
    base: Base,
    handle: Handle | None,
    encoder: ClipImageEncoder | None,
    size_px: int | tuple[int, int] | None,
    number: int | None = None,
) -> Person:
    """Reads the face, once, for both ways in which it acts.

    `handle` is the adapter's, `encoder` reads what some face adapters also want of the picture, and
    `number` is what an explanation calls this person.

    Raises:
        ImpromptError: the picture shows no face, or a file cannot be read.
    """
    if not prompt.is_beside_the_text and not prompt.is_in_the_net:
        return Person(None, None)
    adapter = prompt.identity.adapter
    faces = face_encoder_of(adapter, prompt.face_encoder)
    mask = None if prompt.mask is None else mask_to_tensor(prompt.mask)
    tokens = adapter.tokens(*face_features(adapter, [prompt.image], faces, encoder))
    zero_tokens = adapter.tokens(*face_features_of_nothing(adapter, encoder))
    beside, control = None, None
    if prompt.is_beside_the_text:
        assert handle is not None
        beside = TokenPrompt(
            handle=handle,
            tokens=tokens,
            zero_tokens=zero_tokens,
            scale=prompt.used_scale,
            mask=None if mask is None else mask[None],
            start=prompt.start,
            end=prompt.end,
            number=number,
        )
    if prompt.is_in_the_net:
        size = height_and_width(size_px, base.image_size_px)
        control = MapControl(
            module=prompt.identity.net,
            maps=landmark_images(_landmarks(prompt, faces, size), *size),
            weight=prompt.used_net_weight,
            start=prompt.start,
            end=prompt.end,
            tokens=tokens,
            zero_tokens=zero_tokens,
            mask=mask,
        )
    return Person(beside, control)


def _landmarks(prompt: IdentityPrompt, faces: FaceEncoder, size: tuple[int, int]) -> Tensor:
    """Places for pictures of (height, width), as given or else as they are in the person's picture."""
    if prompt.landmarks is None:
        pixels = pixels_of_image_like(prompt.image)
        height, width = pixels.shape[-2:]
        return landmarks_at_size(faces.landmarks(pixels[None]), (height, width), size)
    if isinstance(prompt.landmarks, Tensor):
        return prompt.landmarks.to(torch.float32)
    return read_landmarks(prompt.landmarks)
