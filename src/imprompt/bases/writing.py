"""Writing a base as a diffusers folder, from which a stock `StableDiffusionPipeline` loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import torch


def write_base(
    folder: Path,
    *,
    unet: Any,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    scheduler: Any,
    image_encoder: Any,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write all parts and the index. `image_encoder` is a `CLIPVisionModelWithProjection`.

    The parts themselves stay in the precision they have.
    """
    networks = {
        "unet": unet,
        "vae": vae,
        "text_encoder": text_encoder,
        "image_encoder": image_encoder,
    }
    for name, network in networks.items():
        copy.deepcopy(network).to(dtype=dtype).save_pretrained(folder / name)
        _read_in_single_precision(folder / name / "config.json")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": ["transformers", type(image_encoder).__name__],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", type(text_encoder).__name__],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "unet": ["diffusers", type(unet).__name__],
        "vae": ["diffusers", type(vae).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def _read_in_single_precision(config_file: Path) -> None:
    """transformers reads a network in the precision its configuration names, diffusers in float32.

    A stock pipeline would end up with halves that do not multiply.
    """
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if "dtype" in config:
        config["dtype"] = "float32"
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
