"""FSDP2: weights, gradients and optimiser state are shared out, the frozen denoiser's weights too.

For bases that do not fit a device beside what trains. Source: Zhao et al. (2304.11277); torch's
`torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.systems.protocol import Figures, System
from imprompt.training.config import TrainConfig
from imprompt.training.denoiser import blocks_of, denoiser_of
from imprompt.training.optim import create_optimizer
from imprompt.training.parallel import Step, tensors_of, trained_parameters
from imprompt.training.processes import Processes


class ShardedEngine:
    """Each process holds a slice of every parameter; wholes are gathered while they are used."""

    def __init__(
        self, processes: Processes, step: Step, system: System, config: TrainConfig
    ) -> None:
        self.processes = processes
        self._mesh = init_device_mesh(processes.device.type, (processes.count,))
        module = step.trained
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), 0)  # every process begins with the first one's
        _keep_fingerprint(getattr(system, "base", None))
        denoiser = denoiser_of(system)
        if denoiser is not None and denoiser is not module:
            # Of the frozen blocks each stands alone, and such a one would stay whole once it was used.
            for block in blocks_of(denoiser):
                fully_shard(block, mesh=self._mesh, reshard_after_forward=True)
        elif denoiser is not None:
            for block in blocks_of(denoiser):
                if any(p.requires_grad for p in block.parameters()):
                    fully_shard(block, mesh=self._mesh)
        # Kept until the step's end: an adapter's weights are used at sites all over the denoiser.
        self._step: Any = fully_shard(step, mesh=self._mesh, reshard_after_forward=False)
        named = trained_parameters(module)
        self.parameters = [p for _, p in named]
        self._places = [_owner(module, name) for name, _ in named]
        if not all(isinstance(p, DTensor) for p in self.parameters):
            raise ImpromptError(
                "fully_shard left parameters whole; this torch is too old for fsdp2."
            )
        self._optimizer = create_optimizer(self.parameters, config)
        self._max_norm = config.max_gradient_norm or float("inf")

    def loss(
        self, batch: dict[str, Tensor], randomness: Randomness, *, is_last: bool
    ) -> tuple[Tensor, Figures]:
        return self._step(batch, randomness)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def without_gradient(self) -> list[int]:
        return [index for index, p in enumerate(self.parameters) if p.grad is None]

    def update(self, learning_rate: float) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def check_synchronised(self) -> None:
        for parameter in self.parameters:
            assert isinstance(parameter, DTensor)
            if parameter.device_mesh.size() != self.processes.count:
                raise ImpromptError(
                    f"Weights are shared out over {parameter.device_mesh.size()} processes of "
                    f"{self.processes.count}."
                )

    def whole(self, index: int, value: Tensor) -> Tensor:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def part(self, index: int, value: Tensor) -> Tensor:
        parameter = self.parameters[index]
        assert isinstance(parameter, DTensor)
        return distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements
        )

    def moments(self, index: int) -> dict[str, Tensor]:
        state = tensors_of(self._optimizer.state.get(self.parameters[index], {}))
        return {name: self.whole(index, value) for name, value in state.items()}

    def set_moments(self, index: int, moments: dict[str, Tensor], step: int) -> None:
        self._optimizer.state[self.parameters[index]] = {
            "step": torch.tensor(float(step), device=self.processes.device),
            **{name: self.part(index, value) for name, value in moments.items()},
        }

    @contextmanager
    def whole_weights(self) -> Generator[None, None, None]:
        """Whole tensors take the slices' places, out of FSDP's sight, and leave again."""
        self._step.reshard()
        wholes = [p.full_tensor() for p in self.parameters if isinstance(p, DTensor)]
        kept = [owner._parameters[name] for owner, name in self._places]
        for (owner, name), whole in zip(self._places, wholes, strict=True):
            owner._parameters[name] = nn.Parameter(whole, requires_grad=False)
        try:
            yield
        finally:
            for (owner, name), parameter in zip(self._places, kept, strict=True):
                owner._parameters[name] = parameter

    def counters(self) -> dict[str, Any]:
        return {}

    def set_counters(self, counters: dict[str, Any]) -> None:
        pass


def _keep_fingerprint(base: Any) -> None:
    """Ask for the base's fingerprint while its weights are whole.

    Of slices it would be another one, and to make them whole takes all processes, where only the first
    writes what is exported.
    """
    if base is not None:
        known = base.fingerprint()
        base.fingerprint = lambda: known


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last
