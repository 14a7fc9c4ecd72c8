"""What a denoiser is told in words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.core.errors import ImpromptError


@dataclass(frozen=True, eq=False)
class TextStates:
    """Texts as a denoiser reads them, one row for each.

    Stable Diffusion 1 and 2 read the sequence and nothing else; Stable Diffusion XL reads all.
    """

    sequence: Float[Tensor, "batch length dim"]
    """One state for each token: what cross-attention reads."""

    pooled: Float[Tensor, "batch pooled_dim"] | None = None
    """One state for the whole text."""

    framing: Float[Tensor, "batch 6"] | None = None
    """Of which picture this is which part, in pixels: its height and width, top and left of the
    part (in the picture as it was resized), height and width of the part. None is the whole of a
    picture as large as the latents."""

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, rows: slice | Sequence[int]) -> "TextStates":
        """The texts of these rows."""
        return self._each(lambda states: states[rows])

    def expand(self, batch: int) -> "TextStates":
        """One text for all, or already one for each."""
        return self._each(lambda states: states.expand(batch, *states.shape[1:]))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "TextStates":
        """On a device, the states in a precision; sizes in pixels stay exact."""
        framing = None if self.framing is None else self.framing.to(device)
        states = TextStates(self.sequence, self.pooled)._each(lambda x: x.to(device, dtype))
        return TextStates(states.sequence, states.pooled, framing)

    @staticmethod
    def join(parts: "Sequence[TextStates]") -> "TextStates":
        """Several batches one after the other.

        Raises:
            ImpromptError: some have what others lack.
        """

        def joined(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            given = [tensor for tensor in tensors if tensor is not None]
            if given and len(given) < len(tensors):
                raise ImpromptError(
                    f"Some of the texts that are denoised together have {name!r} and some have "
                    "none: give it to all of them (also to the negative ones), or to none."
                )
            return torch.cat(given) if given else None

        sequence = joined("sequence")
        assert sequence is not None
        return TextStates(sequence, joined("pooled"), joined("framing"))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TextStates":
        return TextStates(
            change(self.sequence),
            None if self.pooled is None else change(self.pooled),
            None if self.framing is None else change(self.framing),
        )
