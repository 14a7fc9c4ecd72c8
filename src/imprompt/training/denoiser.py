"""The network that costs the most in a step, and its blocks: what is sharded, compiled, computed twice."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from imprompt.core.errors import ImpromptError
from imprompt.systems.protocol import System
from imprompt.training.config import TrainConfig


def denoiser_of(system: System) -> Any | None:
    """The base's UNet, where a system trains something on it; a UNet that trains itself; or none."""
    frozen = getattr(getattr(system, "base", None), "unet", None)
    return frozen if frozen is not None else _if_denoiser(system.module)


def _if_denoiser(module: nn.Module) -> Any | None:
    return module if hasattr(module, "down_blocks") and hasattr(module, "up_blocks") else None


def blocks_of(denoiser: Any) -> list[nn.Module]:
    """Its down, middle and up blocks, in the order of the computation."""
    blocks = [*denoiser.down_blocks, getattr(denoiser, "mid_block", None), *denoiser.up_blocks]
    return [block for block in blocks if block is not None]


_FEW_POSITIONS = 32 * 32


def attention_kernels(system: System, device: torch.device) -> AbstractContextManager[Any]:
    """The kernels of attention to train with, within the block.

    On a CPU torch's flash attention computes its gradient slowly: a third of a step of the embedded base.
    Plain products are faster, and where there are few positions their memory does not matter.
    """
    size = getattr(getattr(denoiser_of(system), "config", None), "sample_size", None)
    if device.type == "cpu" and isinstance(size, int) and size * size <= _FEW_POSITIONS:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def set_up_denoiser(system: System, config: TrainConfig) -> None:
    """Turn on what the configuration asks of the denoiser, and of networks of its kind that train beside
    it: a ControlNet keeps more for its gradient than the frozen denoiser does.

    Raises:
        ImpromptError: the system has none, or it cannot do this.
    """
    if not (config.gradient_checkpointing or config.compile_blocks):
        return
    denoiser = denoiser_of(system)
    if denoiser is None:
        raise ImpromptError(
            "gradient_checkpointing and compile_blocks are for systems with a denoiser; this has none."
        )
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
        for module in system.module.modules():
            if getattr(module, "_supports_gradient_checkpointing", False):
                module.enable_gradient_checkpointing()  # type: ignore[operator]
    if config.compile_blocks:
        repeated = set(getattr(denoiser, "_repeated_blocks", None) or ())
        # A denoiser may be what trains, or train a part of itself: each block is compiled once.
        modules = dict.fromkeys([*denoiser.modules(), *system.module.modules()])
        found = [module for module in modules if type(module).__name__ in repeated]
        if not found:
            raise ImpromptError(
                f"{type(denoiser).__name__} names no repeated blocks to compile; compile_blocks=false."
            )
        for module in found:
            module.compile()
