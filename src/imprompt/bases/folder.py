"""Models in diffusers' folder layout: one sub-folder for each part.

A `source` is a folder (`Path`), read without any network access, or a hub's repository (`str`).
Every error says which part of which model could not be read.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imprompt.bases.clip_vision import ClipImageEncoder
from imprompt.core.errors import ImpromptError, first_line
from imprompt.core.hub import file_from_hub


class ModelIndex(NamedTuple):
    """What a model's model_index.json says."""

    parts: frozenset[str]  # by the names of their folders
    settings: dict[str, Any]  # how the parts are to be used together


def read_index(source: Path | str) -> ModelIndex:
    """Which parts a model has.

    Raises:
        ImpromptError: it is no model in this layout, or not to be had.
    """
    if isinstance(source, Path):
        file = source / "model_index.json"
        if not file.is_file():
            raise ImpromptError(
                f"{source} is no diffusers folder: it has no model_index.json. Give the folder "
                "that holds unet/, vae/, text_encoder/, tokenizer/ and scheduler/."
            )
    else:
        file = file_from_hub(source, "model_index.json")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ImpromptError(f"{file} is damaged: it is no JSON ({error}).") from error
    listed = {part for part, kind in index.items() if isinstance(kind, list) and kind[0]}
    if isinstance(source, Path) and (source / "image_encoder" / "config.json").is_file():
        listed.add("image_encoder")
    settings = {key: value for key, value in index.items() if not isinstance(value, list)}
    return ModelIndex(frozenset(listed), settings)


def load_unet(source: Path | str, name: str, dtype: torch.dtype) -> Any:
    """Its `UNet2DConditionModel`."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return _load(UNet2DConditionModel, source, "unet", name, torch_dtype=dtype)


def load_autoencoder(source: Path | str, name: str, dtype: torch.dtype) -> Any:
    """Its `AutoencoderKL`."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return _load(AutoencoderKL, source, "vae", name, torch_dtype=dtype)


def load_text_encoder(source: Path | str, name: str, dtype: torch.dtype) -> Any:
    """Its `CLIPTextModel`."""
    from transformers.models.clip.modeling_clip import CLIPTextModel

    return _load(CLIPTextModel, source, "text_encoder", name, dtype=dtype)


def load_second_text_encoder(source: Path | str, name: str, dtype: torch.dtype) -> Any:
    """Its `CLIPTextModelWithProjection`."""
    from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

    return _load(CLIPTextModelWithProjection, source, "text_encoder_2", name, dtype=dtype)


def load_image_encoder(
    source: Path | str, name: str, dtype: torch.dtype, subfolder: str = "image_encoder"
) -> ClipImageEncoder:
    """Its `CLIPVisionModelWithProjection`, with its own channel statistics if it says any."""
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    model = _load(CLIPVisionModelWithProjection, source, subfolder, name, dtype=dtype)
    if isinstance(source, Path):
        for folder in (source / "feature_extractor", source / subfolder):
            file = folder / "preprocessor_config.json"
            if file.is_file():
                config = json.loads(file.read_text(encoding="utf-8"))
                if "image_mean" in config and "image_std" in config:
                    return ClipImageEncoder(model, config["image_mean"], config["image_std"])
    return ClipImageEncoder(model)


def load_tokenizer(source: Path | str, name: str, subfolder: str = "tokenizer") -> Any:
    """Its `CLIPTokenizer`, tried once."""
    from transformers import CLIPTokenizer

    local = isinstance(source, Path)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            str(source), subfolder=subfolder, local_files_only=local
        )
        # A tokenizer without its vocabulary's file loads, and knows nothing.
        if len(tokenizer("a").input_ids) < 3 or len(tokenizer) < 4:
            raise ValueError("its vocabulary is empty")
    except Exception as error:
        raise ImpromptError(
            f"{name}: its {subfolder} could not be read ({first_line(error)}). The folder "
            f"{subfolder}/ with vocab.json and merges.txt is needed."
        ) from error
    return tokenizer


def load_scheduler(source: Path | str, name: str) -> Any:
    """Its scheduler's configuration, whichever kind it names, as a `DDIMScheduler`."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    try:
        config: Any = DDIMScheduler.load_config(
            str(source), subfolder="scheduler", local_files_only=isinstance(source, Path)
        )
    except Exception as error:
        raise ImpromptError(
            f"{name}: its scheduler could not be read ({first_line(error)}). The file "
            "scheduler/scheduler_config.json is needed."
        ) from error
    return as_ddim(config, name)


def as_ddim(config: Mapping[str, Any], name: str) -> Any:
    """A DDIM scheduler from any scheduler's configuration, set as Stable Diffusion's pipeline does.

    Latents have no bounds that a predicted sample could be clipped to.

    Raises:
        ImpromptError: the model was not trained on discrete timesteps of growing noise.
    """
    if "beta_schedule" not in config:
        raise ImpromptError(
            f"{name} has a {config.get('_class_name', 'scheduler')} without a beta_schedule: it was "
            "trained on noise of another kind (flow matching or EDM) than Stable Diffusion 1, 2 "
            "and XL, and cannot be denoised as they are."
        )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler.from_config(dict(config), clip_sample=False, steps_offset=1)


def _load(kind: Any, source: Path | str, part: str, name: str, **options: Any) -> Any:
    """One part of a model, with what went wrong in one line."""
    options |= {"subfolder": part, "local_files_only": isinstance(source, Path)}
    if has_only_half_precision_files(source, part):
        options["variant"] = "fp16"
    options["output_loading_info"] = True
    try:
        with quiet_libraries():
            model, info = kind.from_pretrained(str(source), use_safetensors=True, **options)
    except Exception as error:  # the libraries raise a dozen kinds for files that are amiss
        raise ImpromptError(
            f"{name}: its {part or 'model'} could not be read ({first_line(error)}). Needed are "
            f"{Path(part) / 'config.json'} and {Path(part) / '*.safetensors'}."
        ) from error
    check_complete(info, f"{name}: its {part or 'model'}")
    return model


def check_complete(info: Mapping[str, Any], what: str) -> None:
    """Raise an ImpromptError if what was loaded has holes; `info` is what the library told of it.

    The libraries would fill such holes with random numbers, and go on.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise ImpromptError(
            f"{what} lacks {len(missing)} tensors, {missing[0]!r} the first. Is the file complete, "
            "and of the same model as its config.json?"
        )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No bars for reading files, and no remarks on what is as it should be; errors still raise."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in libraries]
    for log in libraries:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, bars_shown) in zip(libraries, before, strict=True):
            log.set_verbosity(verbosity)
            if bars_shown:
                log.enable_progress_bar()


def has_only_half_precision_files(source: Path | str, part: str = "") -> bool:
    """Whether the libraries have to be asked for a part's `fp16` files, as there are no others."""
    if not isinstance(source, Path):
        return False
    names = [file.name for file in (source / part).glob("*.safetensors")]
    return bool(names) and all(".fp16." in file for file in names)
