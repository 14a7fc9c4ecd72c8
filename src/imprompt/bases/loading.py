"""From a name, a folder or a file to a base."""

import re
from os import PathLike
from pathlib import Path

import torch

from imprompt.bases.diorama import GUIDANCE_SCALE, diorama_folder
from imprompt.bases.folder import read_index
from imprompt.bases.placement import checked_device
from imprompt.bases.protocol import Base
from imprompt.bases.single_file import load_single_file
from imprompt.bases.stable_diffusion import load_stable_diffusion
from imprompt.bases.stable_diffusion_xl import load_stable_diffusion_xl
from imprompt.core.errors import ImpromptError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FORMS = (
    '"diorama" (the embedded base), a diffusers folder, a single .safetensors file, or the id '
    '"owner/name" of a model on the hub'
)


def load_base(
    name_or_path: str | PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config: str | PathLike[str] | None = None,
) -> Base:
    """A frozen text-to-image model, its weights in `dtype` whatever they are stored in.

    `name_or_path` is "diorama" (the embedded base), a diffusers folder, a single `.safetensors`
    file, or a hub's "owner/name". Which kind of model it is, Stable Diffusion 1, 2 or XL, is read
    from it. Folders are read without any network access. A single file holds weights only: `config`
    is the diffusers folder that tells their shapes and brings the tokenizers; without it the hub is
    asked for Stable Diffusion's.

    Raises:
        ImpromptError: there is no such model or device, or it is damaged or of an unknown kind.
    """
    device = checked_device(device)
    text = str(name_or_path)
    if text == "diorama":
        base = _load(diorama_folder(), text, dtype, device)
        base.guidance_scale = GUIDANCE_SCALE
        return base
    path = Path(name_or_path)
    if path.is_dir():
        return _load(path, path.resolve().name, dtype, device)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ImpromptError(
                f"{path} is no .safetensors file, the only kind of single file that is read as a "
                f"base. Convert it, or give {FORMS}."
            )
        folder = None if config is None else Path(config)
        return load_single_file(path, folder, dtype=dtype, device=device)
    if isinstance(name_or_path, str) and HUB_ID.fullmatch(text) and path.suffix != ".safetensors":
        return _load(text, text, dtype, device)
    raise ImpromptError(f"There is no base {text!r}: no such file or folder. Give {FORMS}.")


def _load(source: Path | str, name: str, dtype: torch.dtype, device: torch.device) -> Base:
    index = read_index(source, name)
    if "unet" not in index.parts or "text_encoder" not in index.parts:
        raise ImpromptError(
            f"{name} is not of a kind that is known here: needed are at least unet and "
            f"text_encoder, and its parts are {', '.join(sorted(index.parts)) or 'none'}. Bases are "
            "Stable Diffusion 1, 2 and XL (without its refiner)."
        )
    load = load_stable_diffusion_xl if "text_encoder_2" in index.parts else load_stable_diffusion
    return load(source, name=name, index=index, dtype=dtype, device=device)
