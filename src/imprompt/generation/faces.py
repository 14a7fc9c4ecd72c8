"""What adapters for faces read of a picture: who it shows, and for some also how the face looks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter
from imprompt.bases import ClipImageEncoder
from imprompt.checkpoints.identity import READS_FACES
from imprompt.core.errors import ImpromptError
from imprompt.encoders.face import (
    FaceEncoder,
    face_encoder_with,
    loaded_face_encoder,
    published_encoder_of,
)
from imprompt.generation.features import ImageLike, pixels_of_image_like


def face_encoder_of(
    adapter: ImagePromptAdapter, wanted: FaceEncoder | str | None = None
) -> FaceEncoder:
    """The face encoder that an adapter was trained with, or the one that is wanted.

    An adapter that does not tell, as published files do not, is taken for one of the published.

    Raises:
        ImpromptError: it cannot be loaded, is not the one that the adapter knows, or nobody names it and
            it is none of those that are known here.
    """
    trained_with = adapter.metadata.get("face_encoder", "")
    encoder = wanted
    if encoder is None and trained_with:
        encoder = face_encoder_with(trained_with)
        if encoder is None:
            raise ImpromptError(
                f"The {adapter.variant} adapter was trained with another face encoder than those known "
                f"here ({trained_with}): name it (face_encoder=… or --face-encoder)."
            )
    elif encoder is None:
        encoder = published_encoder_of(adapter.variant, adapter.metadata.get("published", ""))
    if isinstance(encoder, str):
        encoder = loaded_face_encoder(encoder)
    dim = adapter.projection.features[0].dim
    if encoder.embed_dim != dim or trained_with not in ("", encoder.fingerprint()):
        raise ImpromptError(
            f"The {adapter.variant} adapter was trained with another face encoder than "
            f"{encoder.name}: it reads {dim} numbers of {trained_with or 'an unnamed one'}."
        )
    return encoder


def face_features(
    adapter: ImagePromptAdapter,
    pictures: Sequence[ImageLike],
    faces: FaceEncoder,
    encoder: ClipImageEncoder | None,
) -> list[Tensor]:
    """What the adapter reads of pictures of persons, in its order, a row for each picture.

    Raises:
        ImpromptError: a picture shows no face, or there is no image encoder and it is needed.
    """
    pixels = [pixels_of_image_like(picture)[None] for picture in pictures]
    wanted = adapter.projection.features
    # InstantID as published reads identity vectors as they come, all others those of length 1.
    as_published = wanted[0].is_sequence and adapter.metadata.get("reads") != READS_FACES
    embeds = torch.cat([faces.embeds(one, normalized=not as_published) for one in pixels])
    if wanted[0].is_sequence:  # InstantID: a sequence of one
        return [embeds[:, None]]
    if len(wanted) == 1:
        return [embeds]
    states = [_encoder(adapter, encoder).hidden_states(faces.crops(one)) for one in pixels]
    return [embeds, torch.cat(states)]


def face_features_of_nothing(
    adapter: ImagePromptAdapter, encoder: ClipImageEncoder | None
) -> list[Tensor]:
    """What stands for no face: an identity vector of zeros."""
    wanted = adapter.projection.features
    zeros = torch.zeros(1, wanted[0].dim)
    if wanted[0].is_sequence:
        return [zeros[:, None]]
    if len(wanted) == 1:
        return [zeros]
    return [zeros, _encoder(adapter, encoder).zero_hidden_states()]


def _encoder(adapter: ImagePromptAdapter, encoder: ClipImageEncoder | None) -> ClipImageEncoder:
    if encoder is None or encoder.hidden_dim != adapter.projection.features[1].dim:
        raise ImpromptError(
            f"The {adapter.variant} adapter also reads hidden states of "
            f"{adapter.projection.features[1].dim} numbers: give generate() the image encoder it was "
            "trained with, image_encoder=load_clip(...)."
        )
    return encoder
