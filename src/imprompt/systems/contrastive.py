"""Contrastive language-image pretraining: the text encoder of the base and the image encoder of adapters.

Source: Radford et al. 2021 (2103.00020), figure 3: a symmetric cross-entropy over the similarities of all
pairs in a batch, with a learned temperature clipped at 100.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from imprompt.bases import Base, image_encoder_of
from imprompt.core.randomness import Randomness
from imprompt.data.rows import Rows
from imprompt.systems.protocol import starts_from_base

MAX_TOKENS = 32


def train_tokenizer(captions: Iterable[str], vocabulary_size: int = 1024) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's format, learned from captions; other text still splits into bytes."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in _merges_of(learner)]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(m) for m in merges)]
    vocabulary = {
        piece: number for number, piece in enumerate(dict.fromkeys([*pieces, start, end]))
    }
    tokenizer_class: Any = CLIPTokenizer
    return tokenizer_class(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _merges_of(tokenizer: Tokenizer) -> list[list[str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def create_encoders(
    tokenizer: Any,
) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
    """The diorama base's text and vision transformers, with random weights."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=64,
        patch_size=8,
        projection_dim=128,
    )
    encoders = CLIPTextModelWithProjection(text), CLIPVisionModelWithProjection(vision)
    for encoder in encoders:
        _initialise(encoder)
    return encoders


@torch.no_grad()
def _initialise(encoder: nn.Module) -> None:
    """Larger weights than the library's, made for long trainings: here the first steps already count."""
    for name, weight in encoder.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif name.endswith("token_embedding.weight"):
            nn.init.normal_(weight, std=0.5)
        elif name.endswith("position_embedding.weight"):
            nn.init.normal_(weight, std=0.2)
        elif name.endswith("class_embedding"):
            nn.init.normal_(weight, std=0.02)
        elif weight.ndim > 1:
            is_residual = name.endswith(("out_proj.weight", "fc2.weight"))
            nn.init.normal_(weight, std=(0.3 if is_residual else 1.0) * weight[0].numel() ** -0.5)


class _TwoTowers(nn.Module):
    def __init__(self, text: CLIPTextModelWithProjection, vision: CLIPVisionModelWithProjection):
        super().__init__()
        self.text = text
        self.vision = vision
        self.log_temperature = nn.Parameter(torch.tensor(2.66))


@dataclass(frozen=True, kw_only=True)
class ContrastiveOptions:
    """What is trained."""

    start: str = "new"
    """`new` for random weights, `base` to go on with the base's encoders."""
    lock_text: bool = False
    """Train the image encoder alone, so that a denoiser trained on the text encoder stays right
    (locked tuning, Zhai et al., 2111.07991, with the roles exchanged)."""


def build(options: ContrastiveOptions, base: Base, columns: Rows) -> ContrastiveSystem:
    """The system for columns of pixels and token ids."""
    text, vision = create_encoders(base.tokenizer)
    if starts_from_base(options.start):
        text.load_state_dict(base.text_encoder.state_dict(), strict=False)
        vision.load_state_dict(image_encoder_of(base).model.state_dict())
    system = ContrastiveSystem(text, vision)
    system.module.text.requires_grad_(not options.lock_text)
    system.module.to(base.device)
    return system


class ContrastiveSystem:
    """Trains both towers on `pixels` (uint8) and one of `phrasing_ids` (rows, phrasings, tokens) at a time.

    `pixel_mean` and `pixel_std` are the vision tower's normalisation of pixels in [0, 1].
    """

    columns = ("pixels", "phrasing_ids")
    rows_are_coupled = True  # each is told from the others
    pixel_mean = (0.48145466, 0.4578275, 0.40821073)
    pixel_std = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, text: CLIPTextModelWithProjection, vision: CLIPVisionModelWithProjection):
        self.module = _TwoTowers(text, vision)

    def _similarities(self, pixels: Tensor, text_ids: Tensor) -> Tensor:
        mean = torch.tensor(self.pixel_mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.pixel_std, device=pixels.device)[:, None, None]
        image = self.module.vision(pixel_values=(pixels.float() / 255.0 - mean) / std).image_embeds
        text = self.module.text(input_ids=text_ids).text_embeds
        image = functional.normalize(image.float(), dim=1)
        text = functional.normalize(text.float(), dim=1)
        return image @ text.T * self.module.log_temperature.exp().clamp(max=100.0)

    def loss(
        self, batch: dict[str, Tensor], randomness: Randomness
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        phrasing = randomness.integers("phrasing", batch["phrasing_ids"].shape[1])
        text_ids = batch["phrasing_ids"][torch.arange(len(phrasing)), phrasing]
        logits = self._similarities(batch["pixels"], text_ids)
        # Two images may have the very same caption: both are then right.
        same = (text_ids[:, None] == text_ids[None]).all(2).float()
        target = same / same.sum(1, keepdim=True)
        loss = 0.5 * (
            functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
        )
        right = (same.gather(1, logits.argmax(1, keepdim=True)) > 0).float().mean()
        return loss, {"right": right.detach()}

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        loss, figures = self.loss(batch, randomness)
        return {"loss": loss.item(), "right": float(figures["right"])}

    def preview(self) -> Image.Image | None:
        return None

    def export(self, path: Path) -> None:
        """Write `text_encoder/` and `image_encoder/` below `path` in the diffusers layout."""
        self.module.text.save_pretrained(path / "text_encoder")
        self.module.vision.save_pretrained(path / "image_encoder")
