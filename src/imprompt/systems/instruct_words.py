"""A beginning for Instruct: tokens that say in the text encoder's language what was asked for.

K' and V' begin as copies of the base's K and V, which read text states. So the resampler is first taught
by regression what the text encoder makes of the words for the part of the image that the instruction
asks for ("as line art", "a red duck"). That needs no denoiser and is a hundred times cheaper; training
with the denoiser then goes on from tokens that are understood, and adds what words do not say.

An adapter that is trained already may be given more tokens: these learn words, while its own are held to
what they say. What was never learnt of it is then learnt in minutes.

Ours, not of the paper. It needs words for what is to be kept, which ground truth or captions of crops,
styles and faces give.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from imprompt.adapters import ImagePromptAdapter
from imprompt.adapters.resampler import InstructResampler
from imprompt.bases import Base, TextStates
from imprompt.checkpoints import save_adapter
from imprompt.core.config import check_range
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.instructions import TASKS
from imprompt.data.rows import Rows
from imprompt.encoders.instruction import instruction_states
from imprompt.systems.denoising import check_same_base, mean_in_parts, replace_rows
from imprompt.systems.instruct import InstructOptions, instruct_adapter, new_like

NUM_ROWS_FOR_SCALE = 2048
SMALLEST_DEVIATION = 1e-3


@dataclass(frozen=True, kw_only=True)
class InstructWordsOptions(InstructOptions):
    """What is trained: as for Instruct, and tokens to add."""

    added_tokens: int = 0
    """Tokens that the adapter in `start_from` gets in addition, which alone learn words."""
    layout_weight: float = 1.0
    """How many times a composition's words count. They say size and place, a tenth of the variance of the
    states of words, which is learnt after all else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ("added_tokens", "layout_weight"), 0)
        if self.added_tokens and not self.start_from:
            raise ImpromptError(
                "added_tokens are added to the adapter in system.start_from, and none is named; "
                "system.num_tokens is how many a new one has."
            )


def build(options: InstructWordsOptions, base: Base, columns: Rows) -> InstructWordsSystem:
    """The system for prepared data with words for what is kept (columns kept_ids, task_ids).

    Raises:
        ImpromptError: as `systems.instruct.build`, or a column is missing.
    """
    check_same_base(columns, base)
    columns.require(("kept_ids", "task_ids"))
    adapter, before = instruct_adapter(options, base), None
    if options.added_tokens:
        before, adapter = adapter, with_more_tokens(adapter, base, options.added_tokens)
    rows = columns.rows(range(min(NUM_ROWS_FOR_SCALE, len(columns))), ["kept_ids"])
    return InstructWordsSystem(base, adapter, options, rows["kept_ids"], before)


@torch.no_grad()
def with_more_tokens(adapter: ImagePromptAdapter, base: Base, count: int) -> ImagePromptAdapter:
    """The same Instruct adapter with `count` tokens more, new ones, after its own."""
    weights = adapter.state_dict()
    latents = weights["image_proj.latents"]
    grown = new_like(adapter, base, more_tokens=count)
    new = grown.state_dict()["image_proj.latents"][:, -count:].to(latents)
    grown.load_state_dict({**weights, "image_proj.latents": torch.cat([latents, new], dim=1)})
    grown.metadata.update(adapter.metadata)
    return grown.to(latents.device)


class InstructWordsSystem:
    """Trains the resampler of an Instruct adapter to say what is kept; K' and V' stay as they are."""

    def __init__(
        self,
        base: Base,
        adapter: ImagePromptAdapter,
        options: InstructWordsOptions,
        kept_ids: Tensor,
        before: ImagePromptAdapter | None = None,
    ) -> None:
        """kept_ids: words of some of the data, for their deviation. before: the adapter without the
        tokens that were added to it, whose own go on saying what it says."""
        self.base = base
        self.adapter = adapter
        self.options = options
        self.module: nn.Module = adapter.image_proj
        self.columns = ("condition_states", "instruction_ids", "kept_ids", "task_ids", "text_ids")
        self.rows_at_once: int | None = None
        """How many rows are validated together; set by the loop, None is all."""
        self._empty_ids = base.tokenize([""]).to(base.device)
        self._before = before
        self._num_held = 0 if before is None else before.num_tokens or 0
        with torch.no_grad():
            states = self._words(kept_ids)
            self._deviation = states.std((0, 1)).clamp(min=SMALLEST_DEVIATION)
            projection = adapter.image_proj
            if not options.start_from and isinstance(projection, InstructResampler):
                projection.norm_out.weight.copy_(self._deviation)
                projection.norm_out.bias.copy_(states.mean((0, 1)))

    @torch.no_grad()
    def _words(self, kept_ids: Tensor) -> Tensor:
        """What the denoiser reads of the words, from the first on, (batch, learning tokens, dim)."""
        ids = kept_ids.to(self.base.device)
        encoded = TextStates.join([self.base.encode_text(part) for part in ids.split(256)])
        count = (self.adapter.num_tokens or 1) - self._num_held
        return encoded.sequence.float()[:, 1 : 1 + count]

    def _errors(self, batch: dict[str, Tensor], no_text: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors of the tokens that learn words and of those that are held, (batch,) each.

        In units of the words' variance; the second is 0 where none is held.
        """
        with torch.no_grad():
            text_ids = replace_rows(batch["text_ids"], self._empty_ids, no_text)
            prompts = self.base.instruct_states(text_ids)
            instructions = instruction_states(
                self.base, batch["instruction_ids"], self.options.instruction_embedding
            )
            conditions = (batch["condition_states"].float(), instructions, prompts)
            wanted = self._words(batch["kept_ids"])
            if self._before is not None:
                wanted = torch.cat([self._before.tokens(*conditions).float(), wanted], dim=1)
        tokens = self.adapter.tokens(*conditions).float()
        # A text encoder of few states may have fewer than there are tokens to learn them.
        errors = ((tokens[:, : wanted.shape[1]] - wanted) / self._deviation).square()
        held, learnt = errors[:, : self._num_held], errors[:, self._num_held :]
        return learnt.mean((1, 2)), held.sum((1, 2)) / max(1, held[0].numel())

    def loss(
        self, batch: dict[str, Tensor], randomness: Randomness
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The share of the words' variance that the tokens do not say, and what the others lost."""
        no_text = randomness.uniform("drop") < self.options.drop_text
        learnt, held = self._errors(batch, no_text)
        is_layout = batch["task_ids"] == TASKS.index("composition")
        weights = torch.where(is_layout, self.options.layout_weight, 1.0)
        return (weights * learnt).mean() + held.mean(), {}

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """The same on held-out rows, and the words when asked for another thing."""
        never = torch.zeros(len(batch["text_ids"]), dtype=torch.bool, device=self.base.device)
        other = {**batch, "instruction_ids": batch["instruction_ids"].roll(1, 0)}
        asked = {
            "unsaid": (batch, 0),
            "unsaid_with_another_instruction": (other, 0),
            "lost_of_before": (batch, 1),
        }
        if self._before is None:
            del asked["lost_of_before"]
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
