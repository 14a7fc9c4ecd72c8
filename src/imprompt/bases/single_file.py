"""Community checkpoints: a whole Stable Diffusion in one `.safetensors` file."""

from pathlib import Path
from typing import Any

import torch

from imprompt.bases.folder import as_ddim, quiet_libraries
from imprompt.bases.latent_space import check_plain_latents
from imprompt.bases.protocol import Base
from imprompt.bases.stable_diffusion import StableDiffusionBase
from imprompt.bases.stable_diffusion_xl import StableDiffusionXLBase, check_reads_framing
from imprompt.core.errors import ImpromptError, first_line

# Every such file keeps its UNet under this name; an adapter or a LoRA does not have it.
UNET_PREFIX = "model.diffusion_model."
# Stable Diffusion XL's two text encoders; of the second alone the refiner is made.
FIRST_ENCODER_PREFIX = "conditioner.embedders.0.transformer."
SECOND_ENCODER_PREFIX = "conditioner.embedders.1.model."
CONDITIONER_PREFIX = "conditioner.embedders."
# The transformers that came after the UNet, under the same name.
TRANSFORMER_PREFIXES = tuple(
    UNET_PREFIX + part for part in ("joint_blocks.", "double_blocks.", "transformer_blocks.")
)
# Tensors without meaning but their name, by which a file says that it predicts v, and that its
# noise schedule ends in noise alone.
PREDICTS_V = "v_pred"
ENDS_IN_NOISE = "ztsnr"
OF_OTHER_NOISE = "edm_"  # how the names of the marks of EDM's models begin
# In the file's header, as sai_modelspec has it, and what schedulers call it.
PREDICTION = "modelspec.prediction_type"
PREDICTIONS_BY_HEADER = {"epsilon": "epsilon", "v": "v_prediction"}


def load_single_file(
    path: Path, config: Path | None, *, dtype: torch.dtype, device: torch.device | str
) -> Base:
    """Reads weights from a file; their shapes, tokenizers and scheduler come from `config`.

    Raises:
        ImpromptError: the file is damaged or no Stable Diffusion, or its configuration is not to
            be had.
    """
    names, header = _names_and_header(path)
    is_xl = _check_is_stable_diffusion(path, names)
    if config is not None and not (config / "model_index.json").is_file():
        raise ImpromptError(
            f"config={config} is no diffusers folder: it has no model_index.json. Give the folder "
            "of a model with the same shapes."
        )
    pipeline = _read_pipeline(path, config, is_xl, dtype)
    check_plain_latents(str(path), pipeline.unet, pipeline.vae)
    scheduler_config = dict(pipeline.scheduler.config)
    if (said := header.get(PREDICTION)) in PREDICTIONS_BY_HEADER:
        scheduler_config["prediction_type"] = PREDICTIONS_BY_HEADER[said]
    if PREDICTS_V in names:
        scheduler_config["prediction_type"] = "v_prediction"
    if ENDS_IN_NOISE in names:
        scheduler_config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    shared: dict[str, Any] = {
        "name": path.stem,
        "unet": pipeline.unet,
        "vae": pipeline.vae,
        "text_encoder": pipeline.text_encoder,
        "tokenizer": pipeline.tokenizer,
        "scheduler": as_ddim(scheduler_config, str(path)),
    }
    base: StableDiffusionBase | StableDiffusionXLBase
    if is_xl:
        check_reads_framing(str(path), pipeline.unet, pipeline.text_encoder_2)
        base = StableDiffusionXLBase(
            **shared,
            text_encoder_2=pipeline.text_encoder_2,
            tokenizer_2=pipeline.tokenizer_2,
            no_text_is_zero=bool(pipeline.config.force_zeros_for_empty_prompt),
        )
    else:
        base = StableDiffusionBase(**shared)
    _check_is_complete(path, base)
    base.to(device, dtype)
    return base


def _read_pipeline(path: Path, config: Path | None, is_xl: bool, dtype: torch.dtype) -> Any:
    """A stock pipeline of the file, for its parts."""
    options: dict[str, Any] = {
        "config": None if config is None else str(config),
        "local_files_only": config is not None,
        "torch_dtype": dtype,
        "feature_extractor": None,
        "image_encoder": None,
    }
    try:
        with quiet_libraries():
            if is_xl:
                from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
                    StableDiffusionXLPipeline,
                )

                return StableDiffusionXLPipeline.from_single_file(
                    str(path), add_watermarker=False, **options
                )
            from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
                StableDiffusionPipeline,
            )

            return StableDiffusionPipeline.from_single_file(
                str(path), safety_checker=None, requires_safety_checker=False, **options
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


def _check_is_complete(path: Path, base: Base) -> None:
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


def _names_and_header(path: Path) -> tuple[frozenset[str], dict[str, str]]:
    """The names of a file's tensors, and what else its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ImpromptError(f"{path} is damaged: it is no safetensors file ({error}).") from error


def _check_is_stable_diffusion(path: Path, names: frozenset[str]) -> bool:
    """Whether it is Stable Diffusion XL; an ImpromptError if it is no Stable Diffusion at all."""

    def has(prefix: str | tuple[str, ...]) -> bool:
        return any(name.startswith(prefix) for name in names)

    if not has(UNET_PREFIX):
        raise ImpromptError(
            f"{path} is no Stable Diffusion checkpoint: no tensor's name begins with "
            f"{UNET_PREFIX!r} (its first is {min(names, default='nothing')!r}). Is it an adapter? "
            "Those go to load_adapter."
        )
    if has(TRANSFORMER_PREFIXES):
        raise ImpromptError(
            f"{path} is a diffusion transformer (as Stable Diffusion 3 and Flux are); bases are "
            "Stable Diffusion 1, 2 and XL."
        )
    if has(OF_OTHER_NOISE):
        raise ImpromptError(
            f"{path} was trained on noise of another kind (EDM's, as CosXL and Playground 2.5) than Stable "
            "Diffusion 1, 2 and XL, and cannot be denoised as they are."
        )
    if not has(CONDITIONER_PREFIX):
        return False
    missing = [
        prefix for prefix in (FIRST_ENCODER_PREFIX, SECOND_ENCODER_PREFIX) if not has(prefix)
    ]
    if missing:
        raise ImpromptError(
            f"{path} is of Stable Diffusion XL's kind, but without the text encoder {missing[0]!r}: "
            "is it the refiner? That goes on from images of the base model, and is no base."
        )
    return True
