"""What the small networks that read pictures of the embedded world are made of, and kept in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from imprompt.core.errors import ImpromptError
from imprompt.core.tensor_files import write_tensors

Network = TypeVar("Network", bound=nn.Module)


def convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """A 3 × 3 convolution, normalised over the batch, with a SiLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.SiLU(),
    )


def save_small_network(network: nn.Module, path: Path, model: str) -> None:
    """Write one safetensors file in half precision, which says what `model` it is.

    Raises:
        ImpromptError: it cannot be written.
    """
    weights = network.state_dict()
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    write_tensors({k: v.contiguous() for k, v in half.items()}, path, {"model": model})


def load_small_network(
    path: Path, build: Callable[[Mapping[str, Tensor]], Network], *, what: str, hint: str
) -> Network:
    """What `save_small_network` wrote, in float32, frozen.

    `build` makes a network of the size that the weights have; `what` it is, and a `hint` of where one
    comes from, stand in the messages.

    Raises:
        ImpromptError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ImpromptError(f"There is no {what} {path}; {hint}.")
    try:
        weights = load_file(path)
        network = build(weights)
        own = network.state_dict()
        network.load_state_dict({k: v.to(own[k].dtype) for k, v in weights.items()})
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise ImpromptError(f"{path} is no {what}; {hint}.") from error
    return network.eval().requires_grad_(False)
