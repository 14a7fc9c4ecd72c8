"""Community checkpoints: a whole Stable Diffusion in one `.safetensors` file."""

from pathlib import Path

import torch

from imprompt.bases.folder import as_ddim, first_line, quiet_libraries
from imprompt.bases.stable_diffusion import StableDiffusionBase
from imprompt.core.errors import ImpromptError

# Every such file keeps its UNet under this name; an adapter or a LoRA does not have it.
UNET_PREFIX = "model.diffusion_model."
SDXL_PREFIX = "conditioner.embedders."


def load_single_file(
    path: Path, config: Path | None, *, dtype: torch.dtype, device: torch.device | str
) -> StableDiffusionBase:
    """Reads weights from a file; their shapes, tokenizer and scheduler come from `config`.

    Raises:
        ImpromptError: the file is damaged or no Stable Diffusion, or its configuration is not to
            be had.
    """
    _check_is_stable_diffusion(path)
    if config is not None and not (config / "model_index.json").is_file():
        raise ImpromptError(
            f"config={config} is no diffusers folder: it has no model_index.json. Give the folder "
            "of a model with the same shapes."
        )
    try:
        with quiet_libraries():
            from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
                StableDiffusionPipeline,
            )

            pipeline = StableDiffusionPipeline.from_single_file(
                str(path),
                config=None if config is None else str(config),
                local_files_only=config is not None,
                torch_dtype=dtype,
                safety_checker=None,
                feature_extractor=None,
                image_encoder=None,
                requires_safety_checker=False,
            )
    except Exception as error:  # the library raises many kinds for a file that does not fit
        advice = (
            "Without config=, its configuration and tokenizer are fetched from the model hub; give "
            "a local diffusers folder of the same kind as config= to do without."
            if config is None
            else f"Does {config} describe a model of the same shapes?"
        )
        raise ImpromptError(
            f"{path} could not be read as a base ({first_line(error)}). {advice}"
        ) from error
    base = StableDiffusionBase(
        name=path.stem,
        unet=pipeline.unet,
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        scheduler=as_ddim(pipeline.scheduler.config),
    )
    _check_is_complete(path, base)
    base.to(device, dtype)
    return base


def _check_is_complete(path: Path, base: StableDiffusionBase) -> None:
    """What a file lacks is left without storage, which would be found out only at use."""
    missing = [
        f"{part}.{name}"
        for part, network in base.parts().items()
        for name, parameter in network.named_parameters()
        if parameter.is_meta
    ]
    if missing:
        raise ImpromptError(
            f"{path} could not be read as a base: it lacks {len(missing)} tensors, {missing[0]!r} "
            "the first. Is the file complete?"
        )


def _check_is_stable_diffusion(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ImpromptError(f"{path} is damaged: it is no safetensors file ({error}).") from error
    if not any(name.startswith(UNET_PREFIX) for name in names):
        first = names[0] if names else "nothing"
        raise ImpromptError(
            f"{path} is no Stable Diffusion checkpoint: no tensor's name begins with "
            f"{UNET_PREFIX!r} (its first is {first!r}). Is it an adapter? Those go to load_adapter."
        )
    if any(name.startswith(SDXL_PREFIX) for name in names):
        raise ImpromptError(
            f"{path} is Stable Diffusion XL, which is not among the bases yet; Stable Diffusion 1 "
            "and 2 are."
        )
