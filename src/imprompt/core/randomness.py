"""Counter-based randomness: every number is a function of (seed, purpose, sample index), nothing else.

What a sample sees does not depend on the batch it is in, on the process that handles it or on what was
drawn before; so a resumed run goes on exactly and many processes equal one.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
"""

# Strict but for what numpy, Pillow and tqdm leave untyped:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """The random numbers of one sample for one purpose. `index` must not be negative."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    key = int.from_bytes(digest, "little")
    # The two low words count the draws of this sample; the index takes the high ones.
    return np.random.Generator(np.random.Philox(key=key, counter=index << 128))


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order in which an epoch visits `length` rows, as int64 (length,)."""
    return generator(seed, epoch, "epoch permutation").permutation(length)


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

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, float32, (batch, *shape)."""
        values = np.empty((len(self.samples), *shape), dtype=np.float32)
        for row, sample in zip(values, self.samples, strict=True):
            generator(self.seed, sample, purpose).standard_normal(out=row, dtype=np.float32)
        return torch.from_numpy(values).to(self.device)

    def uniform(self, purpose: str) -> Tensor:
        """Uniform numbers in [0, 1), float32, (batch,)."""
        values = [
            generator(self.seed, sample, purpose).random(dtype=np.float32)
            for sample in self.samples
        ]
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def integers(self, purpose: str, high: int) -> Tensor:
        """Uniform integers in [0, high), int64, (batch,)."""
        values = [int(generator(self.seed, s, purpose).integers(high)) for s in self.samples]
        return torch.tensor(values, dtype=torch.int64, device=self.device)
