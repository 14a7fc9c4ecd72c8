"""Does a picture look as another does to the image encoder? A likeness of all that is seen.

Penultimate states tell what is where in a picture, how it is painted and in what surroundings. Much of them
is the same in all pictures, so they are compared by what varies from picture to picture.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from imprompt.bases import Base, image_encoder_of
from imprompt.data.rows import Rows
from imprompt.systems.likeness import Likeness

NUM_ROWS_FOR_SCALE = 512
SMALLEST_DEVIATION = 1e-3


class Resemblance:
    """Compares predicted latents with the image encoder's states of the picture that they shall look as."""

    def __init__(
        self, base: Base, some: Float[Tensor, "rows length dim"], weight: float = 1.0
    ) -> None:
        """some: states of some pictures, which tell what varies."""
        states = some.to(base.device).float()
        self._mean = states.mean(0)
        self._deviation = (
            (states - self._mean).square().mean((0, 1)).sqrt().clamp(min=SMALLEST_DEVIATION)
        )
        encoder = image_encoder_of(base)
        self.likeness = Likeness(base, lambda pixels: self.varying(encoder.read(pixels)), weight)

    def varying(self, states: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch all"]:
        """What varies of states, as one vector for each picture, to compare by its direction."""
        return ((states.float() - self._mean) / self._deviation).flatten(1)


def resemblance_for(columns: Rows, base: Base, weight: float) -> Resemblance | None:
    """By the condition images of the data; none if the weight is 0."""
    if not weight:
        return None
    # Here and there, for a folder of portraits may come first.
    numbers = range(0, len(columns), max(1, len(columns) // NUM_ROWS_FOR_SCALE))
    rows = columns.rows(numbers, ("condition_states",))
    return Resemblance(base, rows["condition_states"], weight)
