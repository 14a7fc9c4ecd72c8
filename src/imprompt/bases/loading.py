"""From a name, a folder or a file to a base."""

from os import PathLike
from pathlib import Path

import torch

from imprompt.bases.diorama import GUIDANCE_SCALE, diorama_folder
from imprompt.bases.folder import as_ddim, read_index
from imprompt.bases.placement import checked_device
from imprompt.bases.protocol import Base
from imprompt.bases.single_file import load_single_file
from imprompt.bases.stable_diffusion import StableDiffusionBase, load_stable_diffusion
from imprompt.bases.stable_diffusion_xl import load_stable_diffusion_xl
from imprompt.core.errors import ImpromptError
from imprompt.core.hub import is_file_on_hub, is_on_hub
from imprompt.diffusion.objectives import PREDICTIONS

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
    prediction_type: str | None = None,
    clip_skip: int = 1,
) -> Base:
    """A frozen text-to-image model, its weights in `dtype` whatever they are stored in.

    `name_or_path` is "diorama" (the embedded base), a diffusers folder, a single `.safetensors`
    file, or a hub's "owner/name". Which kind of model it is, Stable Diffusion 1, 2 or XL, is read
    from it. Folders are read without any network access. A single file holds weights only: `config`
    is the diffusers folder that tells their shapes and brings the tokenizers; without it the hub is
    asked for Stable Diffusion's.

    Where a model was made otherwise than its files say: `prediction_type` is what its denoiser predicts
    ("epsilon", "v_prediction" or "sample"), and `clip_skip` which of the text encoder's layers it reads, counted
    from the last (2 for many fine-tunes of Stable Diffusion 1.5).

    Raises:
        ImpromptError: there is no such model, device, prediction or layer, or it is damaged or of an unknown
            kind.
    """
    device = checked_device(device)
    if prediction_type not in (None, *PREDICTIONS):
        raise ImpromptError(
            f"prediction_type is {prediction_type!r}; use one of {', '.join(PREDICTIONS)}."
        )
    if config is not None and Path(name_or_path).suffix != ".safetensors":
        raise ImpromptError(
            f"config={config} is for a single .safetensors file; {name_or_path} brings its own."
        )
    base = _found(name_or_path, None if config is None else Path(config), dtype, device)
    if prediction_type is not None:
        said = {**base.scheduler.config, "prediction_type": prediction_type}
        base.scheduler = as_ddim(said, base.name)
    if clip_skip != 1:
        _read_layer(base, clip_skip)
    return base


def _found(
    name_or_path: str | PathLike[str],
    config: Path | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Base:
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
        return load_single_file(path, config, dtype=dtype, device=device)
    is_repository = isinstance(name_or_path, str) and is_on_hub(text) and not is_file_on_hub(text)
    if is_repository and path.suffix != ".safetensors":
        return _load(text, text, dtype, device)
    raise ImpromptError(f"There is no base {text!r}: no such file or folder. Give {FORMS}.")


def _read_layer(base: Base, clip_skip: int) -> None:
    if not isinstance(base, StableDiffusionBase):
        raise ImpromptError(
            f"{base.name} is of Stable Diffusion XL's kind, which always reads the layers before the last; "
            "leave clip_skip out."
        )
    num_layers = base.text_encoder.config.num_hidden_layers
    if not 1 <= clip_skip <= num_layers:
        raise ImpromptError(
            f"clip_skip is {clip_skip}; the text encoder of {base.name} has layers 1 to {num_layers}, "
            "counted from the last."
        )
    base.clip_skip = clip_skip


def _load(source: Path | str, name: str, dtype: torch.dtype, device: torch.device) -> Base:
    index = read_index(source)
    if "unet" not in index.parts or "text_encoder" not in index.parts:
        raise ImpromptError(
            f"{name} is not of a kind that is known here: needed are at least unet and "
            f"text_encoder, and its parts are {', '.join(sorted(index.parts)) or 'none'}. Bases are "
            "Stable Diffusion 1, 2 and XL (without its refiner)."
        )
    load = load_stable_diffusion_xl if "text_encoder_2" in index.parts else load_stable_diffusion
    return load(source, name=name, index=index, dtype=dtype, device=device)
