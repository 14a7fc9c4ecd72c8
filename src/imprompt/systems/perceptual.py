"""Does a predicted portrait look to the face encoder as the true one does? A loss, beside the noise's.

Eyes, glasses and a nose are a few latents among hundreds, and a denoiser that gets them wrong hardly errs. A
network that has learnt to tell persons apart sees little else, so the portrait that a prediction implies is
decoded, as the true one is, and what the network's layers say of both is compared.

Source: Zhang et al. (1801.03924) for layers compared by channel; Berrada et al. (2411.04873) for doing so beside
the noise's error, from a least signal on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor

from imprompt.bases import Base
from imprompt.bases.latent_space import decode
from imprompt.core.shipped import shipped
from imprompt.encoders.face_network import FaceNetwork, as_the_network_reads, load_face_network
from imprompt.systems.denoising import Attempt

MIN_SIGNAL = 0.1
"""ᾱ_t; from less, a face is guessed."""
SMALLEST_DEVIATION = 1e-2
SHARE_OF_PERSON = 0.5
"""How much the identity vector counts beside the maps. Alone it draws what only the network takes for a face."""


class PortraitLook:
    """Compares predicted latents with true ones through a face network, so that gradients reach the former."""

    def __init__(self, base: Base, network: FaceNetwork) -> None:
        """`network` is frozen, and on the base's device."""
        self._base = base
        self._network = network.eval().requires_grad_(False)

    def distance(
        self, clean: Float[Tensor, "batch channels h w"], true: Float[Tensor, "batch channels h w"]
    ) -> Float[Tensor, " batch"]:
        """How differently they look: the maps' squared difference, in units of the variance in all these portraits, and
        of the identity vectors 1 - cos; 0 and more.

        Args:
            clean: predicted x0 in the denoiser's scale.
            true: what should have been predicted.
        """
        with torch.no_grad():
            *true_maps, true_person = self._seen(true)
        *maps, person = self._seen(clean)
        unlike = 1 - functional.cosine_similarity(person, true_person)
        distance = SHARE_OF_PERSON * unlike
        for found, wanted in zip(maps, true_maps, strict=True):
            deviation = wanted.std((0, 2, 3), keepdim=True).clamp(min=SMALLEST_DEVIATION)
            of_map = ((found - wanted) / deviation).square().mean((1, 2, 3))
            distance = distance + of_map / len(maps)
        return distance

    def share(self, attempt: Attempt, is_portrait: Tensor) -> Tensor:
        """The distances' sum over a batch's portraits of enough signal, of which there may be none, divided by
        the number of all samples. `is_portrait` (batch,) marks them."""
        rows = (is_portrait & (attempt.signal > MIN_SIGNAL)).nonzero()[:, 0]
        if not len(rows):
            return attempt.errors.new_zeros(())
        distance = self.distance(attempt.clean[rows], attempt.latents[rows].float())
        return distance.sum() / len(is_portrait)

    def _seen(self, latents: Tensor) -> list[Tensor]:
        """The network's maps (batch, channels, h, w), fine ones first, and the identity vector (batch, dim)."""
        pixels = decode(self._base.vae, latents, self._base.device)
        return [each.float() for each in self._network.layers(as_the_network_reads(pixels))]


def portrait_look(base: Base) -> PortraitLook:
    """Through the face network that comes with the package."""
    network = load_face_network(shipped("diorama-face-encoder.safetensors"))
    return PortraitLook(base, network.to(base.device))
