"""Engines: how one step is computed by one process or by many. The loop is the same for all.

    single   one process
    ddp      every process holds everything, gradients are averaged (accelerate, torch)
    zero2    and each keeps a part of the optimiser's state and of the gradients (DeepSpeed)
    fsdp2    and of the weights, the base's too, gathered block by block (torch's fully_shard)

Processes take equal slices of each global batch, and all randomness belongs to samples, so that each
engine's losses are those of one process but for rounding; and checkpoints hold whole tensors, so that one
engine goes on where another stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.systems.protocol import Figures, System
from imprompt.training.config import PRECISIONS, TrainConfig
from imprompt.training.optim import create_optimizer
from imprompt.training.processes import Processes


@runtime_checkable  # for the type checks of the tests
class Engine(Protocol):
    """What the loop asks for.

    Attributes:
        parameters: those that train, as this process holds them: whole, or a part of each.
    """

    processes: Processes
    parameters: list[nn.Parameter]

    def loss(
        self, batch: dict[str, Tensor], randomness: Randomness, *, is_last: bool
    ) -> tuple[Tensor, Figures]:
        """The system's loss; `is_last` of the parts a step's batch is cut into."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient to what there is."""
        ...

    def without_gradient(self) -> list[int]:
        """The parameters (by place) that the first backward did not reach."""
        ...

    def update(self, learning_rate: float) -> Tensor:
        """Clip, step, and forget the gradients. The norm before clipping, over all processes."""
        ...

    def check_synchronised(self) -> None:
        """After the first update: raise unless the processes train one model."""
        ...

    def whole(self, index: int, value: Tensor) -> Tensor:
        """A tensor like parameter `index`, of which each process may hold a part, as a whole."""
        ...

    def part(self, index: int, value: Tensor) -> Tensor:
        """This process's part of a whole tensor like parameter `index`."""
        ...

    def moments(self, index: int) -> dict[str, Tensor]:
        """The optimiser's state of a parameter, whole; empty before the first update."""
        ...

    def set_moments(self, index: int, moments: dict[str, Tensor], step: int) -> None:
        """Put it back."""
        ...

    def whole_weights(self) -> AbstractContextManager[None]:
        """Within the block the module can be used and saved as if it were in one process."""
        ...

    def counters(self) -> dict[str, Any]:
        """What else a checkpoint must hold."""
        ...

    def set_counters(self, counters: dict[str, Any]) -> None: ...


class Step(nn.Module):
    """A system's loss as a module's forward, which is where engines take hold of the weights."""

    def __init__(self, system: System, precision: str, device: torch.device) -> None:
        super().__init__()
        self.trained = system.module
        self._system = (system,)  # not a module of ours: the frozen base must not be taken for one
        self._device_type = device.type
        self._dtype = None if precision == "float32" else PRECISIONS[precision]

    def forward(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        enabled = self._dtype is not None
        with torch.autocast(self._device_type, self._dtype or torch.bfloat16, enabled=enabled):
            return self._system[0].loss(batch, randomness)


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


class WholeEngine:
    """Every process holds all weights and all of the optimiser's state: one process, or DDP."""

    def __init__(self, processes: Processes, step: Step, config: TrainConfig) -> None:
        self.processes = processes
        self.parameters = [p for _, p in trained_parameters(step.trained)]
        self._step: nn.Module = step
        self._no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
        if processes.engine == "ddp":
            self._step, self._no_sync = _distributed(step, processes)
        self._optimizer = create_optimizer(self.parameters, config)
        self._max_norm = config.max_gradient_norm or float("inf")
        self._scaler = torch.amp.GradScaler(
            processes.device.type, enabled=config.precision == "float16"
        )
        self._num_skipped = 0

    def loss(
        self, batch: dict[str, Tensor], randomness: Randomness, *, is_last: bool
    ) -> tuple[Tensor, Figures]:
        with nullcontext() if is_last else self._no_sync():
            return self._step(batch, randomness)

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def without_gradient(self) -> list[int]:
        return [index for index, p in enumerate(self.parameters) if p.grad is None]

    def update(self, learning_rate: float) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._max_norm)
        scale = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        # A lower scale means that a gradient overflowed, and the optimiser was passed over.
        self._num_skipped += self._scaler.get_scale() < scale
        self._optimizer.zero_grad()
        return norm

    def check_synchronised(self) -> None:
        check_same_weights(self.processes, self.parameters)

    def whole(self, index: int, value: Tensor) -> Tensor:
        return value

    def part(self, index: int, value: Tensor) -> Tensor:
        return value

    def moments(self, index: int) -> dict[str, Tensor]:
        return tensors_of(self._optimizer.state.get(self.parameters[index], {}))

    def set_moments(self, index: int, moments: dict[str, Tensor], step: int) -> None:
        parameter = self.parameters[index]
        self._optimizer.state[parameter] = {
            "step": self._step_count(step - self._num_skipped),
            **{name: _laid_out_as(parameter, value) for name, value in moments.items()},
        }

    def _step_count(self, step: int) -> Any:
        if not isinstance(self._optimizer, torch.optim.AdamW):
            return step
        return torch.tensor(float(step), device=self.processes.device)

    def whole_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def counters(self) -> dict[str, Any]:
        if not self._scaler.is_enabled():
            return {}
        return {"scaler": self._scaler.state_dict(), "num_skipped": self._num_skipped}

    def set_counters(self, counters: dict[str, Any]) -> None:
        if self._scaler.is_enabled() and "scaler" in counters:
            self._scaler.load_state_dict(counters["scaler"])
            self._num_skipped = int(counters["num_skipped"])


def _distributed(
    step: Step, processes: Processes
) -> tuple[nn.Module, Callable[[], AbstractContextManager[Any]]]:
    """The step in DDP, by accelerate."""
    from accelerate import Accelerator
    from torch.nn.parallel import DistributedDataParallel

    accelerator = Accelerator(cpu=processes.device.type == "cpu")
    wrapped: Any = accelerator.prepare_model(step)
    if accelerator.num_processes != processes.count or not (
        processes.count == 1 or isinstance(wrapped, DistributedDataParallel)
    ):
        raise ImpromptError(
            f"accelerate sees {accelerator.num_processes} processes of {processes.count} and made a "
            f"{type(wrapped).__name__}: gradients would not be averaged. Start with plain torchrun."
        )
    return wrapped, getattr(wrapped, "no_sync", nullcontext)


def check_same_weights(processes: Processes, parameters: Sequence[Tensor]) -> None:
    """Raise an ImpromptError unless all processes hold the same weights, to the bit.

    Their batches differ, so after an update they do only if gradients were averaged.
    """
    if processes.count == 1:
        return
    with torch.no_grad():
        sums = [(p.double().sum(), p.double().abs().sum()) for p in parameters]
        found = processes.gather(torch.stack([value for pair in sums for value in pair]))
    if not bool((found == found[0]).all()):
        raise ImpromptError(
            "After the first step the processes hold different weights: gradients are not averaged. "
            "Start with torchrun, and all with the same command."
        )


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of a moment beside its parameter, and in memory in the same order, channels last for one.

    A fused optimiser goes through the memory of both at once, without a look at the strides.
    """
    if value.shape != parameter.shape:  # of an optimiser in 8 bits: its tables
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """What an optimiser keeps of one parameter, but for the number of steps."""
    return {
        name: value for name, value in state.items() if isinstance(value, Tensor) and name != "step"
    }
