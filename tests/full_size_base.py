"""Random bases of Stable Diffusion 1.5's and XL's size, and training data and steps for them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from imprompt.bases import ClipImageEncoder
from imprompt.bases.stable_diffusion import StableDiffusionBase
from imprompt.bases.stable_diffusion_xl import StableDiffusionXLBase
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns, ColumnsWriter
from imprompt.training.config import TrainConfig
from imprompt.training.loop import train

LATENT_SIDE = 16  # 128 pixels
VIT_H_STATES = (257, 1280)
END_OF_TEXT = SimpleNamespace(
    eos_token_id=49407
)  # all that a base asks of its second tokenizer, if it is given ids
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
        return StableDiffusionXLBase(**parts, text_encoder_2=second, tokenizer_2=END_OF_TEXT)


def vit_h(device: str) -> ClipImageEncoder:
    """An image encoder whose states have ViT-H's shape; of its layers only as many as it takes to have
    a last one."""
    tokens, width = VIT_H_STATES
    vision = CLIPVisionConfig(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=16, patch_size=14,
        projection_dim=1024,
    )  # fmt: skip
    with torch.device(device):
        encoder = ClipImageEncoder(CLIPVisionModelWithProjection(vision))
    assert encoder.zero_hidden_states().shape == (1, tokens, width)
    return encoder


def untrained(monkeypatch) -> None:
    """Let bases of Stable Diffusion 1.5's kind do without a tokenizer and a fingerprint."""
    for name in ("fingerprint", "encoders_fingerprint"):
        monkeypatch.setattr(StableDiffusionBase, name, lambda _: "random")
    monkeypatch.setattr(
        StableDiffusionBase, "tokenize", lambda _, texts: torch.ones(len(texts), 77).long()
    )


def prepared(folder: Path, **more: Tensor) -> Columns:
    """Prepared data: random latents and captions, and what a system wants more, which says how many."""
    folder.mkdir(parents=True)
    count = len(next(iter(more.values())))
    latents = torch.randn(count, 4, LATENT_SIDE, LATENT_SIDE)
    ids = torch.randint(0, 49408, (count, 77))
    writer = ColumnsWriter(folder)
    rows = {"latent_mean": latents, "latent_logvar": latents - 9, "text_ids": ids, **more}
    writer.write(0, rows)
    writer.finish(count, {"encoders_fingerprint": "random"})
    return Columns.open(folder)


def step(system: Any, columns: Columns, device: str) -> Tensor:
    """The loss of two rows; every parameter gets its gradient."""
    batch = {k: v.to(device) for k, v in columns.rows(range(2), system.columns).items()}
    loss, _ = system.loss(batch, Randomness(0, range(2), device))
    loss.backward()
    assert all(p.grad is not None for p in system.module.parameters() if p.requires_grad)
    return loss


def learns_in_three_steps(
    system: Any, columns: Columns, output: Path, export_name: str = "export"
) -> Path:
    """Three steps of the one training loop, which move every parameter that trains; what it exports."""
    trained = [(n, p) for n, p in system.module.named_parameters() if p.requires_grad]
    before = [parameter.detach().clone() for _, parameter in trained]
    config = TrainConfig(steps=3, batch_size=1, validation_rows=1, checkpoint_every_steps=3)
    export = train(system, columns, config, output, export_name=export_name)
    still = [n for (n, p), old in zip(trained, before, strict=True) if torch.equal(p, old)]
    assert not still
    return export
