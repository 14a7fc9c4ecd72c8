"""A beginning for Instruct: tokens that say in the text encoder's language what was asked for.

K' and V' begin as copies of the base's K and V, which read text states. So the resampler is first taught
by regression what the text encoder makes of the words for the part of the image that the instruction
asks for ("as line art", "a red duck"). That needs no denoiser and is a hundred times cheaper; training
with the denoiser then goes on from tokens that are understood, and adds what words do not say.

Beside the tokens for words there may be some for regions (`systems.region_tokens`), which are taught what
the image encoder sees in each part of the image. Added to an adapter that is trained already, whose own
tokens are then held to what they say, they bring it the places that words leave out.

Ours, not of the paper. It needs words for what is to be kept, which ground truth or captions of crops,
styles and faces give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from imprompt.adapters import ImagePromptAdapter
from imprompt.adapters.resampler import InstructResampler
from imprompt.bases import Base, TextStates
from imprompt.checkpoints import save_adapter
from imprompt.core.config import check_range
from imprompt.core.randomness import Randomness
from imprompt.data.rows import Rows
from imprompt.encoders.instruction import instruction_states
from imprompt.systems.denoising import mean_in_parts
from imprompt.systems.image_prompt import check_same_base, replace_rows
from imprompt.systems.instruct import InstructOptions, instruct_adapter
from imprompt.systems.region_tokens import Regions, with_more_tokens
from imprompt.systems.warm_start import caption_ends, states_after

NUM_ROWS_FOR_SCALE = 2048
SMALLEST_DEVIATION = 1e-3


@dataclass(frozen=True, kw_only=True)
class InstructWordsOptions(InstructOptions):
    """What is trained: as for Instruct, and regions."""

    region_tokens: int = 0
    """Tokens, a square number, that learn what stands where; beside those of `num_tokens`, or of the
    adapter in `start_from`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ("region_tokens",), 0)


def build(options: InstructWordsOptions, base: Base, columns: Rows) -> InstructWordsSystem:
    """The system for prepared data with words for what is kept (the column kept_ids).

    Raises:
        ImpromptError: as `systems.instruct.build`, the column is missing, or regions that form no square.
    """
    check_same_base(columns, base)
    columns.require(("kept_ids",))
    count = options.region_tokens
    before = None
    if options.start_from:
        adapter = instruct_adapter(options, base)
        if count:
            before, adapter = adapter, with_more_tokens(adapter, base, count)
    else:
        adapter = instruct_adapter(replace(options, num_tokens=options.num_tokens + count), base)
    rows = columns.rows(
        range(min(NUM_ROWS_FOR_SCALE, len(columns))), ["kept_ids", "condition_states"]
    )
    return InstructWordsSystem(base, adapter, options, rows, before)


class InstructWordsSystem:
    """Trains the resampler of an Instruct adapter to say what is kept; K' and V' stay as they are."""

    def __init__(
        self,
        base: Base,
        adapter: ImagePromptAdapter,
        options: InstructWordsOptions,
        rows: dict[str, Tensor],
        before: ImagePromptAdapter | None = None,
    ) -> None:
        """rows: some of the data, for means and deviations. before: what the tokens said until now, which
        those that are not of regions go on saying; without it they learn words."""
        self.base = base
        self.adapter = adapter
        self.options = options
        self.module: nn.Module = adapter.image_proj
        self.columns = ("condition_states", "instruction_ids", "kept_ids", "text_ids")
        self.rows_at_once: int | None = None
        """How many rows are validated together; set by the loop, None is all."""
        self._empty_ids = base.tokenize([""]).to(base.device)
        self._before = before
        self._num_words = (adapter.projection.num_tokens or 1) - options.region_tokens
        with torch.no_grad():
            states = self._words(rows["kept_ids"])
            self._mean = states.mean((0, 1))
            self._deviation = states.std((0, 1)).clamp(min=SMALLEST_DEVIATION)
            projection = adapter.image_proj
            if not options.start_from and isinstance(projection, InstructResampler):
                projection.norm_out.weight.copy_(self._deviation)
                projection.norm_out.bias.copy_(self._mean)
        self._regions = None
        if options.region_tokens:
            seen = rows["condition_states"].float().to(base.device)
            self._regions = Regions(seen, options.region_tokens, states.shape[-1])

    def _words(self, kept_ids: Tensor) -> Tensor:
        """The text encoder's states from the end of the words on, (batch, tokens, dim)."""
        ids = kept_ids.to(self.base.device)
        encoded = TextStates.join([self.base.encode_text(part) for part in ids.split(256)])
        states = encoded.sequence.float()
        ends = caption_ends(ids[:, : states.shape[1]], self.base.tokenizer.eos_token_id)
        return states_after(states, ends, self._num_words)

    def _errors(self, batch: dict[str, Tensor], no_text: Tensor) -> tuple[Tensor, Tensor]:
        """The squared errors of each sample's words and regions, as shares of variance, (batch,) each.

        The second is 0 where there are no regions.
        """
        seen = batch["condition_states"].float()
        with torch.no_grad():
            text = self.base.encode_text(replace_rows(batch["text_ids"], self._empty_ids, no_text))
            instructions = instruction_states(
                self.base, batch["instruction_ids"], self.options.instruction_embedding
            )
            conditions = (seen, instructions, text.sequence)
            words = (
                self._words(batch["kept_ids"])
                if self._before is None
                else self._before.tokens(*conditions).float()
            )
        told = (self.adapter.tokens(*conditions).float() - self._mean) / self._deviation
        of_words, of_regions = told[:, : self._num_words], told[:, self._num_words :]
        unsaid = (of_words - (words - self._mean) / self._deviation).square().mean((1, 2))
        if self._regions is None:
            return unsaid, torch.zeros_like(unsaid)
        return unsaid, (of_regions - self._regions(seen)).square().mean((1, 2))

    def loss(
        self, batch: dict[str, Tensor], randomness: Randomness
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The share of the words' variance that the tokens do not say, and of the regions'."""
        no_text = randomness.uniform("drop") < self.options.drop_text
        words, regions = self._errors(batch, no_text)
        return words.mean() + regions.mean(), {}

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """Both on held-out rows, and the words when asked for another thing."""
        never = torch.zeros(len(batch["text_ids"]), dtype=torch.bool, device=self.base.device)
        other = {**batch, "instruction_ids": batch["instruction_ids"].roll(1, 0)}
        asked = {
            "unsaid": (batch, 0),
            "unsaid_with_another_instruction": (other, 0),
            "unsaid_of_regions": (batch, 1),
        }
        if self._regions is None:
            del asked["unsaid_of_regions"]
        return {
            name: mean_in_parts(
                lambda rows, _, no_text, part=part: self._errors(rows, no_text)[part],
                given,
                randomness,
                never,
                rows_at_once=self.rows_at_once,
            )
            for name, (given, part) in asked.items()
        }

    def preview(self) -> Image.Image | None:
        """None: nothing is drawn here."""
        return None

    def export(self, path: Path) -> None:
        """Write the adapter, for `systems.instruct` to start from."""
        metadata = {"base": self.base.name, "base_fingerprint": self.base.fingerprint()}
        save_adapter(self.adapter, path, metadata)
