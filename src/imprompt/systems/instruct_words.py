"""A beginning for Instruct: tokens that say in the text encoder's language what was asked for.

K' and V' begin as copies of the base's K and V, which read text states. So the resampler is first taught
by regression what the text encoder makes of the words for the part of the image that the instruction
asks for ("as line art", "a red duck"). That needs no denoiser and is a hundred times cheaper; training
with the denoiser then goes on from tokens that are understood, and adds what words do not say.

An adapter that is trained already may be given more tokens: these learn words, while its own are held to
what they say. Or it is given more layers, which begin by changing nothing, and learns the words of some tasks,
while its tokens for all others are held. What was never learnt of it is then learnt in minutes.

Ours, not of the paper. It needs words for what is to be kept, which ground truth or captions of crops,
styles and faces give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from imprompt.adapters import ImagePromptAdapter
from imprompt.adapters.resampler import InstructResampler
from imprompt.bases import Base, TextStates
from imprompt.checkpoints import save_adapter
from imprompt.core.config import check_left_alone, check_range
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.instructions import TASKS
from imprompt.data.rows import Rows
from imprompt.systems.denoising import check_same_encoders, made_for, mean_in_parts, replace_rows
from imprompt.systems.instruct import SMALLEST_DEVIATION, what_is_read
from imprompt.systems.instruct_growth import instruct_adapter, with_more_layers, with_more_tokens
from imprompt.systems.instruct_options import OF_THE_DENOISER, InstructOptions
from imprompt.systems.protocol import Figures

NUM_ROWS_FOR_SCALE = 2048


@dataclass(frozen=True, kw_only=True)
class InstructWordsOptions(InstructOptions):
    """What is trained: as for Instruct, and tokens to add."""

    added_tokens: int = 0
    """Tokens that the adapter in `start_from` gets in addition, which alone learn words."""
    added_layers: int = 0
    """Layers that the resampler of the adapter in `start_from` gets in addition, after its own. They
    begin by changing nothing, and find what trained ones no longer look for."""
    learn: tuple[str, ...] = ()
    """Tasks whose words are learnt, while for all others the tokens are held to what the adapter in
    `hold_to` says; none named is all of them, and nothing held."""
    hold_to: str = ""
    """The Instruct adapter that tasks not in `learn` are held to; empty is that in `start_from`."""
    layout_weight: float = 1.0
    """How many times a composition's words count. They say size and place, a tenth of the variance of the
    states of words, which is learnt after all else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ("added_tokens", "added_layers", "layout_weight"), 0)
        check_left_alone(
            self,
            OF_THE_DENOISER,
            "words are learnt without the denoiser, with image and instruction always there",
        )
        for name in ("added_tokens", "added_layers", "learn"):
            if getattr(self, name) and not self.start_from:
                raise ImpromptError(
                    f"{name} is about the adapter in system.start_from, and none is named."
                )
        if unknown := sorted(set(self.learn) - set(TASKS)):
            raise ImpromptError(
                f"There is no task {unknown[0]!r} to learn; choose of: {', '.join(TASKS)}."
            )
        if self.hold_to and not self.learn:
            raise ImpromptError("hold_to holds the tasks that are not in learn, and none is there.")
        if self.added_tokens and self.learn:
            raise ImpromptError(
                "With added_tokens all tasks are learnt by these, and with learn some tasks by all "
                "tokens; choose one."
            )


def build(options: InstructWordsOptions, base: Base, columns: Rows) -> InstructWordsSystem:
    """The system for prepared data with words for what is kept (columns kept_ids, task_ids).

    Raises:
        ImpromptError: as `systems.instruct.build`, or a column is missing.
    """
    check_same_encoders(columns, base)
    columns.require(("kept_ids", "task_ids"))
    adapter, before = instruct_adapter(options, base), None
    if options.learn:
        held = replace(options, start_from=options.hold_to or options.start_from)
        before = instruct_adapter(held, base)
    if options.added_tokens:
        before, adapter = adapter, with_more_tokens(adapter, base, options.added_tokens)
    if options.added_layers:
        adapter = with_more_layers(adapter, base, options.added_layers)
    rows = columns.rows(range(min(NUM_ROWS_FOR_SCALE, len(columns))), ["kept_ids"])
    return InstructWordsSystem(base, adapter, options, rows["kept_ids"], before)


class InstructWordsSystem:
    """Trains the resampler of an Instruct adapter to say what is kept; K' and V' stay as they are."""

    rows_at_once: int | None = None

    def __init__(
        self,
        base: Base,
        adapter: ImagePromptAdapter,
        options: InstructWordsOptions,
        kept_ids: Tensor,
        before: ImagePromptAdapter | None = None,
    ) -> None:
        """kept_ids: words of some of the data, for their deviation. before: the adapter as it was, whose
        tokens go on saying what it says, but for those that were added and for tasks to learn."""
        self.base = base
        self.adapter = adapter
        self.options = options
        self.module: nn.Module = adapter.image_proj
        self.columns = ("condition_states", "instruction_ids", "kept_ids", "task_ids", "text_ids")
        self._empty_ids = base.tokenize([""]).to(base.device)
        self._before = before
        self._num_held = 0 if not options.added_tokens or before is None else before.num_tokens or 0
        self._learnt_tasks = torch.tensor([TASKS.index(task) for task in options.learn])
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

    def unsaid(self, batch: dict[str, Tensor], no_text: Tensor) -> Tensor:
        """Squared errors of the tokens that learn words, of the rows that do: (rows that learn,)."""
        batch, no_text = _only(self._learns(batch), batch, no_text)
        if not len(no_text):
            return no_text.float()
        said = self.adapter.tokens(*self._conditions(batch, no_text)).float()[:, self._num_held :]
        words = self._words(batch["kept_ids"])
        # A text encoder of few states may have fewer than there are tokens to learn them.
        return self._distance(said[:, : words.shape[1]], words)

    def lost(self, batch: dict[str, Tensor], no_text: Tensor) -> Tensor:
        """Squared errors against what the adapter said before, of the rows that are held: (rows held,)."""
        batch, no_text = _only(self._is_held(batch), batch, no_text)
        if self._before is None or not len(no_text):
            return no_text.float()
        conditions = self._conditions(batch, no_text)
        with torch.no_grad():
            before = self._before.tokens(*conditions).float()
        said = self.adapter.tokens(*conditions).float()
        return self._distance(said[:, : before.shape[1]], before)

    def _learns(self, batch: dict[str, Tensor]) -> Tensor:
        """Which rows learn words: those of the tasks that are named, or all where none is."""
        tasks = batch["task_ids"]
        if not self.options.learn:
            return torch.ones_like(tasks, dtype=torch.bool)
        return torch.isin(tasks, self._learnt_tasks.to(tasks.device))

    def _is_held(self, batch: dict[str, Tensor]) -> Tensor:
        """Which rows' tokens are held: all where tokens were added, else those of tasks not to learn."""
        learns = self._learns(batch)
        return torch.ones_like(learns) if self._num_held else ~learns

    @torch.no_grad()
    def _conditions(
        self, batch: dict[str, Tensor], no_text: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        text_ids = replace_rows(batch["text_ids"], self._empty_ids, no_text)
        given = {**batch, "text_ids": text_ids}
        return what_is_read(self.base, given, self.options.instruction_embedding)

    def _distance(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """Mean squared errors, (batch,), in units of the words' variance."""
        return ((tokens - wanted) / self._deviation).square().mean((1, 2))

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        """The share of the words' variance that the tokens do not say, and what the others lost."""
        no_text = randomness.uniform("drop") < self.options.drop_text
        tasks = batch["task_ids"][self._learns(batch)]
        weights = torch.where(tasks == TASKS.index("composition"), self.options.layout_weight, 1.0)
        learnt = weights * self.unsaid(batch, no_text)
        return (learnt.sum() + self.lost(batch, no_text).sum()) / len(no_text), {}

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """The same on held-out rows, and the words when asked for another thing.

        Where no row learns words, or none is held, there is no figure of it.
        """
        never = torch.zeros(len(batch["text_ids"]), dtype=torch.bool, device=self.base.device)
        other = {**batch, "instruction_ids": batch["instruction_ids"].roll(1, 0)}
        asked = {}
        if self._learns(batch).any():
            asked["unsaid"] = (self.unsaid, batch)
            asked["unsaid_with_another_instruction"] = (self.unsaid, other)
        if self._is_held(batch).any():
            asked["lost_of_before"] = (self.lost, batch)
        return {
            name: mean_in_parts(
                lambda rows, _, no_text, errors=errors: errors(rows, no_text),
                given,
                randomness,
                never,
                rows_at_once=self.rows_at_once,
            )
            for name, (errors, given) in asked.items()
        }

    def export(self, path: Path) -> None:
        """Write the adapter, for `systems.instruct` to start from."""
        save_adapter(self.adapter, path, made_for(self.base))


def _only(
    rows: Tensor, batch: dict[str, Tensor], no_text: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The batch, and which of it see no text, of the rows that are marked."""
    return {name: values[rows] for name, values in batch.items()}, no_text[rows]
