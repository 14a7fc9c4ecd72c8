"""Networks that take turns on a device, and where each of them computes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, remove_hook_from_module
from torch import nn


class OneAtATime(ModelHook):
    """Brings a network to its device before it works, and the others away from there."""

    def __init__(self, others: Sequence[nn.Module], execution_device: torch.device) -> None:
        self.others = others
        self.execution_device = execution_device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for other in self.others:
            _move(other, torch.device("cpu"))
        _move(module, self.execution_device)
        return args, kwargs


def end_offload(networks: Iterable[nn.Module]) -> None:
    """Take the hooks of `imprompt.bases.offload` away."""
    for network in networks:
        if isinstance(getattr(network, "_hf_hook", None), OneAtATime):
            remove_hook_from_module(network)


def working_device(network: Any) -> torch.device:
    """Where a network computes, which is not where its weights wait if they are offloaded."""
    hook = getattr(network, "_hf_hook", None)
    if isinstance(hook, OneAtATime):
        return hook.execution_device
    return network.device  # of group offloading, too, diffusers tells where it computes


def _move(network: nn.Module, device: torch.device) -> None:
    # Asking one parameter is enough, and much cheaper than asking all of them at every step.
    current = next(network.parameters()).device
    if (current.type, current.index or 0) != (device.type, device.index or 0):
        network.to(device)
