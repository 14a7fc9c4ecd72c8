"""Bringing what the CPU made to where it is computed with."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The same values there. A copy to a GPU neither waits for the work that is queued, nor holds it up.

    Copies from ordinary memory would wait for all of it, at every step anew; those from pinned memory
    only stand in the queue.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
