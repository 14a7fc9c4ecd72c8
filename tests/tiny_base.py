"""Stable Diffusions (1, 2 and XL) of a few thousand random weights, in the standard folder layout.

Everything about it is as in the real ones (same classes, same files), only small, so that tests
need no download and no minutes.
"""

import json
from pathlib import Path
from typing import Any

import torch

IMAGE_SIZE_PX = 32
LATENT_CHANNELS = 4
PIXELS_PER_LATENT = 4
TEXT_DIM = 16
TEXT_LENGTH = 12
VISION_SIZE_PX = 16
VISION_HIDDEN_DIM = 24
VISION_EMBED_DIM = 20

# The second text encoder of the XL kind; its states stand beside the first one's.
SECOND_TEXT_DIM = 24
POOLED_DIM = 12
TIME_EMBED_DIM = 8


def build_parts(
    seed: int = 0, prediction_type: str = "epsilon", *, generation: int = 1
) -> dict[str, Any]:
    """The networks and the scheduler, with random weights: a function of the seed.

    `generation` 2 is built as Stable Diffusion 2: other heads, linear projections, a wider text.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    text_dim = {1: TEXT_DIM, 2: 2 * TEXT_DIM}[generation]
    differences: dict[str, Any] = {"attention_head_dim": 2}
    if generation == 2:
        differences = {
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "upcast_attention": True,
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=IMAGE_SIZE_PX // PIXELS_PER_LATENT,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=text_dim,
            **differences,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(4, 8, 8),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=IMAGE_SIZE_PX,
            scaling_factor=0.5,
        )
        hidden_act = {1: "quick_gelu", 2: "gelu"}[generation]
        config = CLIPTextConfig(**text_config(text_dim), hidden_act=hidden_act)
        text_encoder = CLIPTextModel(config)
        image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision_config()))
    networks = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    networks["image_encoder"] = image_encoder
    for network in networks.values():
        network.eval().requires_grad_(False)
    return {**networks, "scheduler": build_scheduler(prediction_type)}


def build_xl_parts(seed: int = 0, prediction_type: str = "epsilon") -> dict[str, Any]:
    """The same of the XL kind: two text encoders, attention of several layers, framing."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=IMAGE_SIZE_PX // PIXELS_PER_LATENT,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=TEXT_DIM + SECOND_TEXT_DIM,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_EMBED_DIM,
            projection_class_embeddings_input_dim=POOLED_DIM + 6 * TIME_EMBED_DIM,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(4, 8, 8),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=IMAGE_SIZE_PX,
            scaling_factor=0.13025,
        )
        text_encoder = CLIPTextModel(CLIPTextConfig(**text_config(TEXT_DIM)))
        second = CLIPTextConfig(
            **text_config(SECOND_TEXT_DIM), projection_dim=POOLED_DIM, hidden_act="gelu"
        )
        text_encoder_2 = CLIPTextModelWithProjection(second)
    networks = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    networks["text_encoder_2"] = text_encoder_2
    for network in networks.values():
        network.eval().requires_grad_(False)
    return {**networks, "scheduler": build_scheduler(prediction_type)}


def text_config(dim: int) -> dict[str, Any]:
    return {
        "vocab_size": len(vocabulary()),
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }


def vision_config() -> dict[str, Any]:
    return {
        "hidden_size": VISION_HIDDEN_DIM,
        "intermediate_size": 2 * VISION_HIDDEN_DIM,
        "projection_dim": VISION_EMBED_DIM,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": VISION_SIZE_PX,
        "patch_size": 8,
    }


def build_scheduler(prediction_type: str = "epsilon") -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def vocabulary() -> dict[str, int]:
    """Start, end, every letter within and at the end of a word, and two whole words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-"
    pieces = ["<|startoftext|>", "<|endoftext|>"]
    pieces += [*letters, *(letter + "</w>" for letter in letters)]
    pieces += ["re", "red</w>", "ca", "cat</w>"]
    return {piece: number for number, piece in enumerate(pieces)}


def write_tiny_base(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: str = "epsilon",
    image_encoder: bool = True,
    generation: int = 1,
) -> Path:
    """Writes a diffusers folder that `load_base` and a stock pipeline read, in well under 1 s."""
    parts = build_parts(seed, prediction_type, generation=generation)
    if not image_encoder:
        del parts["image_encoder"]
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    _write_tokenizer(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if not image_encoder:
        index["image_encoder"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_tiny_xl_base(
    folder: Path, *, seed: int = 0, prediction_type: str = "epsilon", no_text_is_zero: bool = True
) -> Path:
    """Writes a diffusers folder of the XL kind; as the real ones it has no image encoder."""
    for name, part in build_xl_parts(seed, prediction_type).items():
        part.save_pretrained(folder / name)
    _write_tokenizer(folder / "tokenizer")
    # The second encoder's padding is another token than its end.
    _write_tokenizer(folder / "tokenizer_2", padding="a")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": no_text_is_zero,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _write_tokenizer(folder: Path, padding: str = "<|endoftext|>") -> None:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    merges = ["#version: 0.2", "r e", "re d</w>", "c a", "ca t</w>"]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TEXT_LENGTH,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": padding,
        "unk_token": "<|endoftext|>",
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
