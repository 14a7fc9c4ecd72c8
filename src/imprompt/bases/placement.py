"""Where the networks of a base are: on which device, in which precision, or only one at a time."""

from collections.abc import Sequence

import torch
from accelerate.hooks import add_hook_to_module

from imprompt.bases.protocol import Base
from imprompt.bases.turns import OneAtATime
from imprompt.core.errors import ImpromptError


def offload(base: Base, device: torch.device | str = "cuda") -> None:
    """Keep on `device` only the network that is at work, and the others in main memory.

    The text encoders, the denoiser and the autoencoder then take turns, so that a device needs room
    for the largest alone. Networks move once per image batch, not once per step. `base.to(device)`
    ends it.

    Raises:
        ImpromptError: there is no such device.
    """
    device = checked_device(device)
    networks = list(base.parts().values())
    base.to("cpu")
    for network in networks:
        others = [other for other in networks if other is not network]
        add_hook_to_module(network, OneAtATime(others, device))


def default_device() -> torch.device:
    """A GPU, where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def checked_device(device: torch.device | str) -> torch.device:
    """The device, if it is there.

    Raises:
        ImpromptError: it is not, or nothing is called so.
    """
    available = ["cpu", "meta"]
    available += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    available += ["mps"] if torch.backends.mps.is_available() else []
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ImpromptError(
            f"There is no device {str(device)!r}; here is: {_shown(available)}."
        ) from error
    if found.type in ("cpu", "cuda", "mps") and not any(
        str(found) in (name, name.split(":")[0]) for name in available
    ):
        raise ImpromptError(
            f"The device {str(device)!r} is not available to torch; here is: {_shown(available)}. "
            "Does a GPU's driver run, and was torch installed for it?"
        )
    return found


def _shown(available: Sequence[str]) -> str:
    return ", ".join(name for name in available if name != "meta")
