"""What a projection reads: the contract between image encoders and adapters."""

from typing import NamedTuple


class Feature(NamedTuple):
    """One input of a projection: `(batch, dim)`, or `(batch, length, dim)` if it is a sequence."""

    name: str
    dim: int
    is_sequence: bool

    @property
    def shape(self) -> str:
        """For messages."""
        return f"(batch, length, {self.dim})" if self.is_sequence else f"(batch, {self.dim})"
