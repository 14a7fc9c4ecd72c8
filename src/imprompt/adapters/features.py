"""What a projection reads: the contract between image encoders and adapters."""

from typing import NamedTuple


class Feature(NamedTuple):
    """One input of a projection: `(batch, dim)`, or `(batch, length, dim)` if it is a sequence.

    A sequence may be of any length, unless `length` tells it.
    """

    name: str
    dim: int
    is_sequence: bool
    length: int | None = None

    @property
    def shape(self) -> str:
        """For messages."""
        if not self.is_sequence:
            return f"(batch, {self.dim})"
        return f"(batch, {self.length or 'length'}, {self.dim})"
