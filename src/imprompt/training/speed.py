"""How much a step computes, and how much of what the device could compute that is."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCount(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, convolutions and attention.

    Unlike torch's own counter it leaves every operation as it is, so that a step that is counted
    computes the same bits as one that is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        elif func._overloadpacket.__name__ in _CPU_ATTENTION:
            self.total += _attention_flops(func._overloadpacket.__name__, args)
        return result


# torch's registry knows the attention kernels of GPUs only.
_CPU_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


def _attention_flops(name: str, args: Any) -> int:
    """Two products of (queries × width × keys) forward; five backward, which computes one again."""
    query, key = args[:2] if not name.endswith("backward") else args[1:3]
    batch, heads, queries, width = query.shape
    products = 5 if name.endswith("backward") else 2
    return products * 2 * batch * heads * queries * key.shape[2] * width


@contextmanager
def counted(enabled: bool) -> Generator[FlopCount | None, None, None]:
    """Within the block all work is counted, if `enabled`."""
    if not enabled:
        yield None
        return
    with FlopCount() as count:
        yield count


def matrix_product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product: what could be had here."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(4):
        _wait_for(device)
        start = time.perf_counter()
        _ = left @ right
        _wait_for(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Speed:
    """Samples per second and the share of the device's arithmetic that they use, since the last look."""

    def __init__(self, device: torch.device, dtype: torch.dtype, num_processes: int) -> None:
        self.flops_per_sample = 0.0
        self._device, self._dtype, self._num_processes = device, dtype, num_processes
        self._possible: float | None = None
        self._since = time.monotonic()

    @contextmanager
    def paused(self) -> Generator[None, None, None]:
        """What is done within the block is no training and does not count."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def look(self, num_samples: int) -> dict[str, float]:
        """Of the samples since the last look, all processes' together."""
        now = time.monotonic()
        rate = num_samples / max(now - self._since, 1e-9)
        self._since = now
        figures = {"samples_per_second": rate}
        if self.flops_per_sample:
            if self._possible is None:
                self._possible = matrix_product_speed(self._device, self._dtype)
                self._since = time.monotonic()
            figures["utilisation"] = (
                rate * self.flops_per_sample / self._num_processes / self._possible
            )
        return figures
