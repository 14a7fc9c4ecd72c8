"""Contrastive language-image pretraining: the text encoder of the base and the image encoder of adapters.

Source: Radford et al. 2021 (2103.00020), figure 3: a symmetric cross-entropy over the similarities of all
pairs in a batch, with a learned temperature clipped at 100.

An encoder that adapters already stand on can learn more without making them useless: what it says of
pictures of objects is then held to what it said before, while portraits teach it persons. Ours; as in
learning without forgetting (Li and Hoiem, 1606.09282), with states in the place of classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
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
from imprompt.bases.clip_vision import CLIP_MEAN, CLIP_STANDARD_DEVIATION
from imprompt.core.config import check_range
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.rows import Rows
from imprompt.diorama import KINDS
from imprompt.diorama.vocabulary import PERSON
from imprompt.systems.protocol import Figures, starts_from_base
from imprompt.systems.warm_start import ridge_regression

MAX_TOKENS = 32
NUM_PAIRS_TO_FIT = 2048
SMALLEST_DEVIATION = 1e-3
CAPTION_COLUMNS = {"whole": "phrasing_ids", "subject": "subject_ids"}


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
    """What is trained, on what."""

    start: str = "new"
    """`new` for random weights, `base` to go on with the base's encoders."""
    lock_text: bool = False
    """Train the image encoder, and of the text encoder its projection alone, so that a denoiser trained
    on the text encoder stays right (locked tuning, Zhai et al., 2111.07991, with the roles exchanged)."""
    captions: str = "whole"
    """`whole` for captions that tell all of a picture, in one of several phrasings (column
    phrasing_ids), `subject` for those that say only what or whom it shows (column subject_ids). Among
    whole captions few differ in a face alone, and it is learnt last."""
    hold: float = 0.0
    """How strongly what is said of objects stays what it was; 0 leaves it free. Needs start="base" and
    the column labels, which tells persons from objects."""

    def __post_init__(self) -> None:
        check_range(self, ("hold",), 0)
        if self.captions not in CAPTION_COLUMNS:
            raise ImpromptError(
                f"captions is {self.captions!r}; it must be one of: {', '.join(CAPTION_COLUMNS)}."
            )
        if self.hold and not starts_from_base(self.start):
            raise ImpromptError('hold keeps what the base\'s encoder says; it needs start="base".')


def build(options: ContrastiveOptions, base: Base, columns: Rows) -> ContrastiveSystem:
    """The system for columns of pixels and token ids.

    Raises:
        ImpromptError: the data lack a column.
    """
    text, vision = create_encoders(base.tokenizer)
    before = None
    if starts_from_base(options.start):
        before = image_encoder_of(base).model
        text.text_model.load_state_dict(base.text_encoder.state_dict())
        vision.load_state_dict(before.state_dict())
    system = ContrastiveSystem(text, vision, options, before)
    if before is not None:
        columns.require(system.columns)
        fit_text_projection(text, vision, columns, CAPTION_COLUMNS[options.captions])
    text.requires_grad_(not options.lock_text)
    text.text_projection.requires_grad_(True)
    system.module.to(base.device)
    return system


@torch.no_grad()
def fit_text_projection(
    text: CLIPTextModelWithProjection, vision: nn.Module, columns: Rows, caption_column: str
) -> None:
    """Find again the text encoder's projection into the space of pictures, which a base does without."""
    # Evenly from all of them, for data of several folders come one folder after the other.
    some = range(0, len(columns), max(1, len(columns) // NUM_PAIRS_TO_FIT))
    rows = columns.rows(some, ["pixels", caption_column])
    ids = rows[caption_column]
    ids = ids if ids.ndim == 2 else ids[:, 0]
    texts = torch.cat([text.text_model(input_ids=part).pooler_output for part in ids.split(256)])
    pictures = rows["pixels"].split(256)
    images = torch.cat([vision(pixel_values=_normalized(part)).image_embeds for part in pictures])
    # The projection has no bias: with every pair and its opposite the means are zero.
    weight, _ = ridge_regression(torch.cat([texts, -texts]), torch.cat([images, -images]))
    text.text_projection.weight.copy_(weight.T)


def _normalized(pixels: Tensor) -> Tensor:
    """What the image encoder reads of pixels in 0 … 255."""
    mean = torch.tensor(CLIP_MEAN, device=pixels.device)[:, None, None]
    deviation = torch.tensor(CLIP_STANDARD_DEVIATION, device=pixels.device)[:, None, None]
    return (pixels.float() / 255.0 - mean) / deviation


class ContrastiveSystem:
    """Trains both towers on `pixels` (uint8) and captions."""

    rows_are_coupled = True  # each is told from the others

    def __init__(
        self,
        text: CLIPTextModelWithProjection,
        vision: CLIPVisionModelWithProjection,
        options: ContrastiveOptions | None = None,
        before: nn.Module | None = None,
    ):
        """before: the image encoder whose word on objects is kept, where `options.hold` is not 0."""
        self.module = _TwoTowers(text, vision)
        self.options = ContrastiveOptions() if options is None else options
        self._before = before
        self._captions = CAPTION_COLUMNS[self.options.captions]
        held = ("labels",) if self.options.hold else ()
        self.columns = ("pixels", self._captions, *held)

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        text_ids = batch[self._captions]
        if text_ids.ndim == 3:
            phrasing = randomness.integers("phrasing", text_ids.shape[1])
            text_ids = text_ids[torch.arange(len(phrasing)), phrasing]
        pixels = _normalized(batch["pixels"])
        hold = self.options.hold
        seen: Any = self.module.vision(pixel_values=pixels, output_hidden_states=hold > 0)
        logits = self._similarities(seen.image_embeds, text_ids)
        # Two images may have the very same caption: both are then right.
        same = (text_ids[:, None] == text_ids[None]).all(2).float()
        target = same / same.sum(1, keepdim=True)
        loss = 0.5 * (
            functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
        )
        right = (same.gather(1, logits.argmax(1, keepdim=True)) > 0).float().mean()
        figures: Figures = {"right": right.detach()}
        if hold:
            moved = self._moved(seen, pixels, batch["labels"][:, 0] != KINDS.index(PERSON))
            loss = loss + hold * moved
            figures["moved"] = moved.detach()
        return loss, figures

    def _similarities(self, image: Tensor, text_ids: Tensor) -> Tensor:
        text = self.module.text(input_ids=text_ids).text_embeds
        image = functional.normalize(image.float(), dim=1)
        text = functional.normalize(text.float(), dim=1)
        return image @ text.T * self.module.log_temperature.exp().clamp(max=100.0)

    def _moved(self, seen: Any, pixels: Tensor, is_object: Tensor) -> Tensor:
        """How far what adapters read of objects is from what it was, in units of its variance.

        That is the penultimate states, and the embedding.
        """
        assert self._before is not None
        with torch.no_grad():
            before: Any = self._before(pixel_values=pixels, output_hidden_states=True)
        count = is_object.sum().clamp(min=1)
        moved = pixels.new_zeros(())
        for now, then in (
            (seen.hidden_states[-2], before.hidden_states[-2]),
            (seen.image_embeds[:, None], before.image_embeds[:, None]),
        ):
            then = then.float()
            deviation = then.std((0, 1)).clamp(min=SMALLEST_DEVIATION)
            errors = ((now.float() - then) / deviation).square().mean((1, 2))
            moved = moved + (errors * is_object).sum() / count
        return moved

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        loss, figures = self.loss(batch, randomness)
        return {"loss": loss.item()} | {name: float(value) for name, value in figures.items()}

    def export(self, path: Path) -> None:
        """Write `text_encoder/` and `image_encoder/` below `path` in the diffusers layout."""
        self.module.text.save_pretrained(path / "text_encoder")
        self.module.vision.save_pretrained(path / "image_encoder")
