"""Random bases of Stable Diffusion 1.5's and XL's size, and training data and steps for them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from imprompt.bases.stable_diffusion import StableDiffusionBase
from imprompt.bases.stable_diffusion_xl import StableDiffusionXLBase
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns, ColumnsWriter

LATENT_SIDE = 32  # 256 pixels
XL: dict[str, Any] = {
    "cross_attention_dim": 2048,
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}


def full_size_base(device: str, is_xl: bool = False, image_encoder: Any = None) -> Any:
    """A base on `device` with random weights, or on the device "meta" with none."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    def text(hidden: int, layers: int, heads: int, kind: Any = CLIPTextModel, **more: Any) -> Any:
        config = CLIPTextConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            **more,
        )
        return kind(config)

    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        unet: dict[str, Any] = XL if is_xl else {"cross_attention_dim": 768, "sample_size": 64}
        parts: dict[str, Any] = {
            "name": "full size",
            "unet": UNet2DConditionModel(**unet),
            "vae": vae,
            "text_encoder": text(768, 12, 12),
            "tokenizer": None,
            "scheduler": DDIMScheduler(),
            "image_encoder": image_encoder,
        }
        if not is_xl:
            return StableDiffusionBase(**parts)
        second = text(1280, 2, 20, CLIPTextModelWithProjection, projection_dim=1280)
        return StableDiffusionXLBase(**parts, text_encoder_2=second, tokenizer_2=None)


def untrained(monkeypatch) -> None:
    """Let bases of Stable Diffusion 1.5's kind do without a tokenizer and a fingerprint."""
    monkeypatch.setattr(StableDiffusionBase, "fingerprint", lambda _: "random")
    monkeypatch.setattr(
        StableDiffusionBase, "tokenize", lambda _, texts: torch.ones(len(texts), 77).long()
    )


def two_rows(folder: Path, **more: Tensor) -> Columns:
    """Prepared data of two pairs: random latents and captions, and what a system wants more."""
    folder.mkdir(parents=True)
    latents = torch.randn(2, 4, LATENT_SIDE, LATENT_SIDE)
    ids = torch.randint(0, 49408, (2, 77))
    writer = ColumnsWriter(folder)
    rows = {"latent_mean": latents, "latent_logvar": latents - 9, "text_ids": ids, **more}
    writer.write(0, rows)
    writer.finish(2, {"base_fingerprint": "random"})
    return Columns.open(folder)


def step(system: Any, columns: Columns, number: int, device: str) -> Tensor:
    """The loss of both rows at a step's random numbers; every parameter gets its gradient."""
    batch = {k: v.to(device) for k, v in columns.rows(range(2), system.columns).items()}
    loss, _ = system.loss(batch, Randomness(0, range(2 * number, 2 * number + 2), device))
    loss.backward()
    assert all(p.grad is not None for p in system.module.parameters() if p.requires_grad)
    return loss
