"""Is the person of a picture that is being learnt the one who was asked for? A loss, beside the noise's.

The noise's error is spread over the whole picture, and who is seen is decided by few pixels of it. So the
picture that a prediction implies is decoded and shown to the face encoder, and what it says is compared.

Source: the ID loss of PuLID (2404.16022), section 3.3, here on one prediction of x0: for noise on the target, or
where a drawing from noise stops (`systems.drawn`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor

from imprompt.bases import Base
from imprompt.bases.latent_space import decode
from imprompt.core.errors import ImpromptError
from imprompt.data.rows import Rows
from imprompt.encoders.face import DioramaFaceEncoder, face_encoder_with
from imprompt.systems.protocol import Figures

MIN_SIGNAL = 0.02
"""ᾱ_t; in what is predicted from less nobody is to be known."""


class Likeness:
    """Compares predicted latents with identity vectors, so that gradients reach the prediction."""

    def __init__(self, base: Base, faces: DioramaFaceEncoder, weight: float = 1.0) -> None:
        """`faces` is frozen, as the base is, and moved to the base's device."""
        self.weight = weight
        self._base = base
        self.faces = faces
        faces.network.to(base.device)

    def distance(
        self, latents: Float[Tensor, "batch channels h w"], id_embeds: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, " batch"]:
        """1 - cos of the two faces' vectors, in [0, 2].

        Args:
            latents: predicted x0 in the denoiser's scale, of portraits.
            id_embeds: who should be seen; of any length.
        """
        seen, _ = self.faces.read(decode(self._base.vae, latents, self._base.device))
        return 1 - functional.cosine_similarity(seen.float(), id_embeds.float())

    def beside(
        self,
        loss: Tensor,
        clean: Float[Tensor, "faces channels h w"],
        id_embeds: Float[Tensor, "faces dim"],
        num_rows: int,
    ) -> tuple[Tensor, Figures]:
        """The loss with this one beside it, by its weight, and figures of both.

        It is the distances' sum over the latents where a face is to be seen, of which there may be none,
        divided by the number of all the batch's rows, so that a batch may be cut into parts.
        """
        unlike = torch.zeros_like(loss)
        if len(clean):
            unlike = self.distance(clean, id_embeds).sum() / num_rows
        figures: Figures = {"loss_of_noise": loss.detach(), "loss_of_likeness": unlike.detach()}
        return loss + self.weight * unlike, figures


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
    return Likeness(base, faces, weight)
