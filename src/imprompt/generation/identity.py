"""A person to keep: one picture says who, five landmarks say where the face shall be."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.adapters.sites import Number, Scale
from imprompt.bases import Base
from imprompt.checkpoints.identity import Identity
from imprompt.core.errors import ImpromptError
from imprompt.encoders.face import FaceEncoder
from imprompt.encoders.landmarks import checked_places, landmark_images, read_landmarks
from imprompt.generation.conditions import check_time_span, is_zero
from imprompt.generation.controls import MapControl
from imprompt.generation.faces import face_encoder_of, face_features, face_features_of_nothing
from imprompt.generation.features import ImageLike, to_pixels
from imprompt.generation.prompts import ImagePrompt

Landmarks = Tensor | str | PathLike[str]


@dataclass(frozen=True, eq=False)
class IdentityPrompt:
    """A picture of a person who shall be drawn, and what keeps the likeness.

    Raises:
        ImpromptError: start and end are no time span, or landmarks of another shape or in pixels.

    Source: InstantID (2401.07519), section 3.
    """

    image: ImageLike
    """A file, a PIL image, or pixels (3, height, width) in [-1, 1]."""

    identity: Identity
    """Adapter and IdentityNet, as `load_identity` reads them."""

    landmarks: Landmarks | None = None
    """Where eyes, nose and mouth shall be, as fractions of width and height: one face for all pictures
    or one for each, or a file (see `read_landmarks`). By default where they are in `image`."""

    scale: Scale = 1.0
    """λ, the weight of the face beside the text; see `ImagePrompt`. 0 is without adapter."""

    net_weight: Number = 1.0
    """How much of what IdentityNet adds is added; 0 is without it."""

    start: Number = 0.0
    end: Number = 1.0
    face_encoder: FaceEncoder | str | None = None
    """Who reads the face; see `ImagePrompt`."""

    def __post_init__(self) -> None:
        check_time_span(self.start, self.end)
        if isinstance(self.landmarks, Tensor):
            if self.landmarks.shape[1:] != (5, 2):
                raise ImpromptError(
                    f"landmarks have shape {tuple(self.landmarks.shape)}; (images, 5, 2) is needed."
                )
            checked_places(self.landmarks, "IdentityPrompt")

    @property
    def image_prompt(self) -> ImagePrompt:
        """The part that is an image prompt: the face's tokens beside the text."""
        return ImagePrompt(
            self.image,
            adapter=self.identity.adapter,
            scale=self.scale,
            start=self.start,
            end=self.end,
            face_encoder=self.face_encoder,
        )


def identity_control(
    prompt: IdentityPrompt, base: Base, size_px: int | tuple[int, int] | None
) -> MapControl:
    """The part that is a ControlNet: it reads the landmarks, and the face's tokens instead of the text.

    Raises:
        ImpromptError: the picture shows no face, or a file cannot be read.
    """
    adapter = prompt.identity.adapter
    faces = face_encoder_of(adapter, prompt.face_encoder)
    features = face_features(adapter, [prompt.image], faces, base.image_encoder)
    nothing = face_features_of_nothing(adapter, base.image_encoder)
    size = base.image_size_px if size_px is None else size_px
    height, width = (size, size) if isinstance(size, int) else size
    return net_control(
        prompt.identity,
        base,
        adapter.tokens(*features),
        adapter.tokens(*nothing),
        landmark_images(_landmarks(prompt, faces), height, width),
        weight=0.0 if is_zero(prompt.net_weight) else prompt.net_weight,
        start=prompt.start,
        end=prompt.end,
    )


def net_control(
    identity: Identity,
    base: Base,
    tokens: Float[Tensor, "images tokens dim"],
    zero_tokens: Float[Tensor, "one tokens dim"],
    maps: Float[Tensor, "images 3 height width"],
    *,
    weight: Number = 1.0,
    start: Number = 0.0,
    end: Number = 1.0,
) -> MapControl:
    """IdentityNet with ready tokens and drawings of landmarks."""
    return MapControl(
        module=identity.net.to(base.device, base.dtype),
        maps=maps,
        weight=weight,
        start=start,
        end=end,
        tokens=tokens,
        zero_tokens=zero_tokens,
    )


def controls_of(
    prompts: Sequence[IdentityPrompt], base: Base, size_px: int | tuple[int, int] | None
) -> list[MapControl]:
    """IdentityNets that act, one for each prompt whose net has a weight."""
    return [
        identity_control(prompt, base, size_px)
        for prompt in prompts
        if prompt.net_weight != 0 and prompt.start < prompt.end
    ]


def _landmarks(prompt: IdentityPrompt, faces: FaceEncoder) -> Tensor:
    if prompt.landmarks is None:
        return faces.landmarks(to_pixels(prompt.image)[None])
    if isinstance(prompt.landmarks, Tensor):
        return prompt.landmarks.to(torch.float32)
    return read_landmarks(prompt.landmarks)
