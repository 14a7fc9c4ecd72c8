"""Work that generation.py counts instead of timing: floating-point operations, and kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from generation_contenders import Case, Contenders, build_unet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class KernelCounter(TorchDispatchMode):
    """Counts operators that compute something: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += not operator.is_view
        return operator(*args, **(kwargs or {}))


def flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def kernels(call: Callable[[], Any]) -> int:
    with KernelCounter() as counter:
        call()
    return counter.count


@torch.inference_mode()
def work_of(case: Case, batch: int, latents: int, num_steps: int) -> dict[str, Any]:
    """FLOPs per step of a generation, relative to the bare UNet's, and kernels per step.

    FLOPs are those of the full size, on tensors without memory. Kernels are counted on a UNet of the
    same layers, but narrow.
    """
    with torch.device("meta"):
        full = Contenders(build_unet("sd15"), case, latents, batch)
        steps = {name: flops(step) for name, step in full.steps().items()}
        once = flops(full.prepare)
    narrow = Contenders(build_unet("narrow"), case, 8, batch)
    launched = {name: kernels(step) for name, step in narrow.steps().items()}
    bare = steps["bare"]
    ours = steps["imprompt"] + once / num_steps
    return {
        "num_steps": num_steps,
        "bare": {"gflop": round(bare / 1e9, 3), "kernels": launched["bare"]},
        "imprompt": {
            "ratio": round(ours / bare, 5),
            "gflop_per_step": round(steps["imprompt"] / 1e9, 3),
            "gflop_once": round(once / 1e9, 3),
            "kernels": launched["imprompt"],
        },
        "diffusers": {
            "ratio": round(steps["diffusers"] / bare, 5),
            "gflop_per_step": round(steps["diffusers"] / 1e9, 3),
            "kernels": launched["diffusers"],
        },
    }
