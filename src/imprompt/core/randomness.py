"""Counter-based randomness: every number is a function of (seed, purpose, sample index), nothing else.

What a sample sees does not depend on the batch it is in, on the process that handles it or on what was
drawn before; so a resumed run goes on exactly and many processes equal one.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
"""

# Strict but for what numpy, Pillow and tqdm leave untyped:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from imprompt.core.transfer import to_device

_FEISTEL_ROUNDS = 8
# Odd numbers with well mixed bits, from MurmurHash3's and SplitMix64's finalisers.
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """The random numbers of one sample for one purpose. `index` must not be negative."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    key = int.from_bytes(digest, "little")
    # The two low words count the draws of this sample; the index takes the high ones.
    return np.random.Generator(np.random.Philox(key=key, counter=index << 128))


def permuted(seed: int, epoch: int, positions: np.ndarray, length: int) -> np.ndarray:
    """The rows, of `length` in all, that an epoch visits at some positions of its order: int64, as given.

    The order is a pseudo-random permutation that is computed where it is asked for and never stored, so
    that shuffling a billion rows costs what shuffling ten does: a Feistel network over the smallest even
    number of bits that holds every row; what it sends outside is sent on until it is inside.

    Source: Luby & Rackoff 1988; Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 3.
    """
    half_bits = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = generator(seed, epoch, "epoch permutation").integers(
        0, 2**64, _FEISTEL_ROUNDS, dtype=np.uint64
    )

    def once(values: np.ndarray) -> np.ndarray:
        left, right = values >> half_bits, values & mask
        for key in keys:
            mixed = (right + key) * _MIX_1
            mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX_2
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        return (left << half_bits) | right

    rows = once(np.asarray(positions, dtype=np.uint64))
    while (outside := rows >= length).any():
        rows[outside] = once(rows[outside])
    return rows.astype(np.int64)


@contextmanager
def own_randomness(seed: int) -> Generator[None, None, None]:
    """New weights draw from this seed; the caller's stream of random numbers stays untouched.

    They are drawn on the CPU: a GPU's streams are left alone.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class Randomness:
    """The randomness of one batch: sample i of the batch draws as `samples[i]` does anywhere else."""

    def __init__(
        self, seed: int, samples: Sequence[int], device: str | torch.device = "cpu"
    ) -> None:
        self.seed = seed
        self.samples = tuple(int(sample) for sample in samples)
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.samples)

    def of(self, rows: Iterable[int]) -> Randomness:
        """The randomness of some samples of the batch."""
        return Randomness(self.seed, [self.samples[row] for row in rows], self.device)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, float32, (batch, *shape)."""
        values = np.empty((len(self.samples), *shape), dtype=np.float32)
        for row, sample in zip(values, self.samples, strict=True):
            generator(self.seed, sample, purpose).standard_normal(out=row, dtype=np.float32)
        return to_device(torch.from_numpy(values), self.device)

    def uniform(self, purpose: str) -> Tensor:
        """Uniform numbers in [0, 1), float32, (batch,)."""
        values = [
            generator(self.seed, sample, purpose).random(dtype=np.float32)
            for sample in self.samples
        ]
        return to_device(torch.tensor(values, dtype=torch.float32), self.device)

    def integers(self, purpose: str, high: int) -> Tensor:
        """Uniform integers in [0, high), int64, (batch,)."""
        values = [int(generator(self.seed, s, purpose).integers(high)) for s in self.samples]
        return to_device(torch.tensor(values, dtype=torch.int64), self.device)
