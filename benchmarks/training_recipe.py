"""The IP-Adapter authors' way of training, written anew: what their script's step does, in its order.

The UNet stays in float32 under autocast; autoencoder, text and image encoder (in half precision) work at
every step; conditions are dropped in a Python loop; the loss is gathered and printed at every step. With
SD 1.5's networks, AdamW, and image files that a loader decodes, as in their `tutorial_train.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

NUM_TOKENS = 4


class ImageFiles(Dataset):
    """One item: pixels for the autoencoder, pixels for the image encoder, token ids, what is dropped."""

    def __init__(self, files: list[Path], size_px: int, encoder_px: int, tokenizer: Any) -> None:
        self.files, self.size_px, self.encoder_px = files, size_px, encoder_px
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index % len(self.files)]
        image = Image.open(file).convert("RGB")
        text = file.with_suffix(".txt").read_text()
        draw = random.random()
        drop_image = draw < 0.05 or 0.10 <= draw < 0.15
        if 0.05 <= draw < 0.15:
            text = ""
        return {
            "image": _pixels(image, self.size_px) * 2 - 1,
            "clip_image": (_pixels(image, self.encoder_px) - 0.45) / 0.27,
            "ids": self.tokenizer(text),
            "drop": int(drop_image),
        }


def _pixels(image: Image.Image, size_px: int) -> Tensor:
    ratio = size_px / min(image.size)
    width, height = (max(size_px, round(side * ratio)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size_px) // 2, (height - size_px) // 2
    image = image.crop((left, top, left + size_px, top + size_px))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Projection(nn.Module):
    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.proj = nn.Linear(embed_dim, NUM_TOKENS * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, image_embeds: Tensor) -> Tensor:
        return self.norm(self.proj(image_embeds).reshape(-1, NUM_TOKENS, self.width))


class TextAndImageAttention(nn.Module):
    """The last tokens are the image's; two attentions, added up."""

    def __init__(self, hidden_dim: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(width, hidden_dim, bias=False)
        self.to_v_ip = nn.Linear(width, hidden_dim, bias=False)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Tensor:
        batch, length, _ = hidden_states.shape
        text = encoder_hidden_states[:, :-NUM_TOKENS]
        image = encoder_hidden_states[:, -NUM_TOKENS:]

        def heads(values: Tensor) -> Tensor:
            return values.view(batch, -1, attn.heads, values.shape[-1] // attn.heads).transpose(
                1, 2
            )

        query = heads(attn.to_q(hidden_states))
        result = functional.scaled_dot_product_attention(
            query, heads(attn.to_k(text)), heads(attn.to_v(text))
        )
        result = result + functional.scaled_dot_product_attention(
            query, heads(self.to_k_ip(image)), heads(self.to_v_ip(image))
        )
        result = result.transpose(1, 2).reshape(batch, length, -1)
        return attn.to_out[1](attn.to_out[0](result))


class Recipe(nn.Module):
    """UNet, projection and the added attention layers, as one module, as theirs are."""

    def __init__(self, unet: Any, embed_dim: int) -> None:
        super().__init__()
        width = unet.config.cross_attention_dim
        self.unet = unet
        self.image_proj = Projection(embed_dim, width)
        processors, added = dict(unet.attn_processors), []
        for name in processors:
            if "attn2" in name:
                attention = unet.get_submodule(name.removesuffix(".processor"))
                added.append(TextAndImageAttention(attention.to_k.out_features, width))
                processors[name] = added[-1]
        self.added = nn.ModuleList(added)
        unet.set_attn_processor(processors)

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, embeds: Tensor) -> Tensor:
        states = torch.cat([text, self.image_proj(embeds)], 1)
        return self.unet(noisy, timesteps, states).sample


def steps(
    networks: dict[str, Any],
    scheduler: Any,
    files: list[Path],
    tokenizer: Any,
    *,
    size_px: int,
    batch_size: int,
    half: torch.dtype,
    workers: int,
) -> Iterator[float]:
    """Train for ever; yields the loss of each step."""
    accelerator = Accelerator(
        mixed_precision="bf16" if half == torch.bfloat16 else "fp16",
        cpu=not torch.cuda.is_available(),
    )
    device = accelerator.device
    unet, vae = networks["unet"].to(device), networks["vae"].to(device, half)
    text_encoder = networks["text_encoder"].to(device, half)
    image_encoder = networks["image_encoder"].to(device, half)
    model: Any = Recipe(unet, image_encoder.config.projection_dim).to(device)
    unet.requires_grad_(False)
    model.added.requires_grad_(True)
    optimizer: Any = torch.optim.AdamW(
        [*model.image_proj.parameters(), *model.added.parameters()], lr=1e-4, weight_decay=0.01
    )
    data = ImageFiles(files, size_px, image_encoder.config.image_size, tokenizer)
    loader = DataLoader(data, shuffle=True, batch_size=batch_size, num_workers=workers)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for number, batch in enumerate(loader):
        with torch.no_grad():
            latents = vae.encode(batch["image"].to(device, half)).latent_dist.sample()
            latents = latents * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.no_grad():
            embeds = image_encoder(batch["clip_image"].to(device, half)).image_embeds
        kept = []
        for embed, drop in zip(embeds, batch["drop"], strict=True):
            kept.append(torch.zeros_like(embed) if drop == 1 else embed)
        with torch.no_grad():
            text = text_encoder(batch["ids"].to(device))[0]
        prediction = model(noisy, timesteps, text, torch.stack(kept))
        loss = functional.mse_loss(prediction.float(), noise.float(), reduction="mean")
        average = accelerator.gather(loss.repeat(batch_size)).mean().item()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {number}, loss {average}", flush=True)
        yield average
