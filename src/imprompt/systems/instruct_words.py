"""A beginning for Instruct: tokens that say in the text encoder's language what was asked for.

K' and V' begin as copies of the base's K and V, which read text states. So the resampler is first taught
by regression what the text encoder makes of the words for the part of the image that the instruction
asks for ("as line art", "a red duck"). That needs no denoiser and is a hundred times cheaper; training
with the denoiser then goes on from tokens that are understood, and adds what words do not say.

Ours, not of the paper. It needs words for what is to be kept, which ground truth or captions of crops,
styles and faces give.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as functional
from PIL import Image
from torch import Tensor, nn

from imprompt.adapters import ImagePromptAdapter
from imprompt.adapters.resampler import InstructResampler
from imprompt.bases import Base, TextStates
from imprompt.checkpoints import save_adapter
from imprompt.core.randomness import Randomness
from imprompt.data.rows import Rows
from imprompt.encoders.instruction import instruction_states
from imprompt.systems.denoising import mean_in_parts
from imprompt.systems.image_prompt import check_same_base, replace_rows
from imprompt.systems.instruct import InstructOptions, instruct_adapter
from imprompt.systems.warm_start import caption_ends, states_after

NUM_ROWS_FOR_SCALE = 2048
SMALLEST_DEVIATION = 1e-3


def build(options: InstructOptions, base: Base, columns: Rows) -> InstructWordsSystem:
    """The system for prepared data with words for what is kept (the column kept_ids).

    Raises:
        ImpromptError: as `systems.instruct.build`, or the column is missing.
    """
    check_same_base(columns, base)
    columns.require(("kept_ids",))
    adapter = instruct_adapter(options, base)
    rows = columns.rows(range(min(NUM_ROWS_FOR_SCALE, len(columns))), ["kept_ids"])
    return InstructWordsSystem(base, adapter, options, rows["kept_ids"])


class InstructWordsSystem:
    """Trains the resampler of an Instruct adapter to say what is kept; K' and V' stay as they are."""

    def __init__(
        self, base: Base, adapter: ImagePromptAdapter, options: InstructOptions, kept_ids: Tensor
    ) -> None:
        self.base = base
        self.adapter = adapter
        self.options = options
        self.module: nn.Module = adapter.image_proj
        self.columns = ("condition_states", "instruction_ids", "kept_ids", "text_ids")
        self.rows_at_once: int | None = None
        """How many rows are validated together; set by the loop, None is all."""
        self._empty_ids = base.tokenize([""]).to(base.device)
        with torch.no_grad():
            states = self._targets(kept_ids)
            self._mean = states.mean((0, 1))
            self._deviation = states.std((0, 1)).clamp(min=SMALLEST_DEVIATION)
            projection = adapter.image_proj
            if not options.start_from and isinstance(projection, InstructResampler):
                projection.norm_out.weight.copy_(self._deviation)
                projection.norm_out.bias.copy_(self._mean)

    @torch.no_grad()
    def _targets(self, kept_ids: Tensor) -> Tensor:
        """What the tokens shall be: states from the end of the words on, (batch, tokens, dim)."""
        ids = kept_ids.to(self.base.device)
        encoded = TextStates.join([self.base.encode_text(part) for part in ids.split(256)])
        states = encoded.sequence.float()
        ends = caption_ends(ids[:, : states.shape[1]], self.base.tokenizer.eos_token_id)
        return states_after(states, ends, self.adapter.projection.num_tokens or 1)

    def _errors(self, batch: dict[str, Tensor], no_text: Tensor) -> Tensor:
        """The squared error of each sample's tokens, in units of the states' variance, (batch,)."""
        with torch.no_grad():
            text = self.base.encode_text(replace_rows(batch["text_ids"], self._empty_ids, no_text))
            instructions = instruction_states(
                self.base, batch["instruction_ids"], self.options.instruction_embedding
            )
            targets = self._targets(batch["kept_ids"])
        tokens = self.adapter.tokens(batch["condition_states"].float(), instructions, text.sequence)
        errors = functional.mse_loss(
            (tokens.float() - self._mean) / self._deviation,
            (targets - self._mean) / self._deviation,
            reduction="none",
        )
        return errors.mean((1, 2))

    def loss(
        self, batch: dict[str, Tensor], randomness: Randomness
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The share of the words' variance that the tokens do not say."""
        no_text = randomness.uniform("drop") < self.options.drop_text
        return self._errors(batch, no_text).mean(), {}

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """The same on held-out rows, as asked and asked for another thing."""
        never = torch.zeros(len(batch["text_ids"]), dtype=torch.bool, device=self.base.device)
        other = {**batch, "instruction_ids": batch["instruction_ids"].roll(1, 0)}
        given = {"unsaid": batch, "unsaid_with_another_instruction": other}
        return {
            name: mean_in_parts(
                lambda rows, _, no_text: self._errors(rows, no_text),
                one,
                randomness,
                never,
                rows_at_once=self.rows_at_once,
            )
            for name, one in given.items()
        }

    def preview(self) -> Image.Image | None:
        """None: nothing is drawn here."""
        return None

    def export(self, path: Path) -> None:
        """Write the adapter, for `systems.instruct` to start from."""
        metadata = {"base": self.base.name, "base_fingerprint": self.base.fingerprint()}
        save_adapter(self.adapter, path, metadata)
