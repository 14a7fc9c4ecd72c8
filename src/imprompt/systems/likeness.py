"""Does a picture that is being learnt look like what was asked for? A loss, beside the noise's.

The noise's error is spread over the whole picture, and who is seen is decided by few pixels of it. So the
picture that a prediction implies is decoded and shown to an encoder, and what this says is compared: a face
encoder of persons, the image encoder of whole pictures (`systems.resemblance`).

Source: the ID loss of PuLID (2404.16022), section 3.3, here on one prediction of x0: for noise on the target, or
where a drawing from noise stops (`systems.drawn`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor

from imprompt.bases import Base
from imprompt.bases.latent_space import decode
from imprompt.core.errors import ImpromptError
from imprompt.data.rows import Rows
from imprompt.encoders.face import DioramaFaceEncoder, face_encoder_with

MIN_SIGNAL = 0.02
"""ᾱ_t below which what is predicted is too blurred for anybody to be recognised."""

See = Callable[[Tensor], Tensor]
"""Of pixels (batch, 3, h, w), in about [-1, 1], the vectors (batch, dim); gradients pass through."""


class Likeness:
    """Compares predicted latents with vectors, so that gradients reach the prediction."""

    def __init__(self, base: Base, see: See, weight: float = 1.0) -> None:
        """`see` gives the vectors of pictures; its encoder is frozen, as the base is, and on its device."""
        self.weight = weight
        self._base = base
        self._see = see

    def distance(
        self, latents: Float[Tensor, "batch channels h w"], vectors: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, " batch"]:
        """1 - cos of what is seen and what should be, in [0, 2].

        Args:
            latents: predicted x0 in the denoiser's scale.
            vectors: of what should be seen; of any length.
        """
        seen = self._see(decode(self._base.vae, latents, self._base.device))
        return 1 - functional.cosine_similarity(seen.float(), vectors.float())

    def share(
        self,
        clean: Float[Tensor, "some channels h w"],
        vectors: Float[Tensor, "some dim"],
        num_rows: int,
    ) -> Tensor:
        """The distances' sum over these latents, of which there may be none, divided by the number of all
        the batch's rows, so that a batch may be cut into parts."""
        if not len(clean):
            return clean.new_zeros(())
        return self.distance(clean, vectors).sum() / num_rows


def likeness_for(columns: Rows, base: Base, weight: float) -> Likeness | None:
    """With the face encoder that wrote the data's identity vectors; none if the weight is 0.

    Raises:
        ImpromptError: it is none that gradients pass through.
    """
    if not weight:
        return None
    columns.require(("id_embeds",))
    fingerprint = str(columns.meta.get("face_encoder", ""))
    faces = face_encoder_with(fingerprint) if fingerprint else None
    if not isinstance(faces, DioramaFaceEncoder):
        name = faces.name if faces else "another one than those that come with the package"
        raise ImpromptError(
            f"No gradients pass through the face encoder of {columns.path} ({name}), and likeness needs "
            "them: set system.likeness=0."
        )
    faces.network.to(base.device)
    return Likeness(base, lambda pixels: faces.read(pixels)[0], weight)
