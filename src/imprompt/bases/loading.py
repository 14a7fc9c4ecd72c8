"""From a name, a folder or a file to a base."""

import re
from os import PathLike
from pathlib import Path

import torch

from imprompt.bases.diorama import diorama_folder
from imprompt.bases.protocol import Base
from imprompt.bases.single_file import load_single_file
from imprompt.bases.stable_diffusion import load_stable_diffusion
from imprompt.core.errors import ImpromptError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FORMS = (
    '"diorama" (the embedded base), a diffusers folder, a single .safetensors file, or the id '
    '"owner/name" of a model on the hub'
)


def load_base(
    name_or_path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    config: str | PathLike[str] | None = None,
) -> Base:
    """A frozen text-to-image model, its weights in `dtype` whatever they are stored in.

    `name_or_path` is "diorama" (the embedded base), a diffusers folder, a single `.safetensors`
    file, or a hub's "owner/name". Folders are read without any network access. A single file holds
    weights only: `config` is the diffusers folder that tells their shapes and brings the tokenizer;
    without it the hub is asked for Stable Diffusion's.

    Raises:
        ImpromptError: there is no such model, or it is damaged or of an unknown kind.
    """
    text = str(name_or_path)
    if text == "diorama":
        return load_stable_diffusion(diorama_folder(), name=text, dtype=dtype, device=device)
    path = Path(name_or_path)
    if path.is_dir():
        return load_stable_diffusion(path, name=path.resolve().name, dtype=dtype, device=device)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ImpromptError(
                f"{path} is no .safetensors file, the only kind of single file that is read as a "
                f"base. Convert it, or give {FORMS}."
            )
        folder = None if config is None else Path(config)
        return load_single_file(path, folder, dtype=dtype, device=device)
    if isinstance(name_or_path, str) and HUB_ID.fullmatch(text) and path.suffix != ".safetensors":
        return load_stable_diffusion(text, name=text, dtype=dtype, device=device)
    raise ImpromptError(f"There is no base {text!r}: no such file or folder. Give {FORMS}.")
