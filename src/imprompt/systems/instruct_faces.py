"""A beginning for Instruct's faces: tokens that say who is seen, as a face encoder would.

Words tell few persons apart, and the denoiser's error hardly asks for more: who it is shows in few pixels. So
the resampler of a trained Instruct adapter learns by regression that a linear map can read the identity
vector out of the mean of its tokens, where it is told to take the face; the map is then thrown away. All tokens
are held to what they said, those of faces less. It needs no denoiser; training with the denoiser, with a LoRA
and `likeness` (`systems.instruct`), then draws what the tokens say.

Ours, not of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from imprompt.adapters import ImagePromptAdapter
from imprompt.bases import Base
from imprompt.checkpoints import save_adapter
from imprompt.core.config import check_left_alone, check_range
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.rows import Rows
from imprompt.systems.denoising import check_same_encoders, made_for, means_in_parts, replace_rows
from imprompt.systems.instruct import FACE, FACE_COLUMNS, SMALLEST_DEVIATION, what_is_read
from imprompt.systems.instruct_growth import instruct_adapter
from imprompt.systems.instruct_options import OF_THE_DENOISER, InstructOptions
from imprompt.systems.protocol import Figures

NUM_ROWS_FOR_SCALE = 512
HOLD_OF_FACES = 0.3  # their tokens must change, and still be understood


@dataclass(frozen=True, kw_only=True)
class InstructFacesOptions(InstructOptions):
    """What is trained: the resampler of the Instruct adapter in `start_from`."""

    identity_weight: float = 1.0
    """How many times it counts that a face's vector cannot be read (1 - cos), beside what the tokens lost of
    what they said, in units of their variance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ("identity_weight",), 0)
        check_left_alone(
            self,
            OF_THE_DENOISER,
            "faces are learnt without the denoiser, with image and instruction always there",
        )


def build(options: InstructFacesOptions, base: Base, columns: Rows) -> InstructFacesSystem:
    """The system for prepared data with identity vectors (`prepare --variant instruct-faces`).

    Raises:
        ImpromptError: as `systems.instruct.build`, no adapter to start from, or a column is missing.
    """
    if not options.start_from:
        raise ImpromptError(
            "instruct-faces goes on from an Instruct adapter: name it in system.start_from."
        )
    check_same_encoders(columns, base)
    columns.require(FACE_COLUMNS)
    adapter, before = instruct_adapter(options, base), instruct_adapter(options, base)
    # Here and there, for a folder of faces may come first.
    numbers = range(0, len(columns), max(1, len(columns) // NUM_ROWS_FOR_SCALE))
    some = columns.rows(numbers, InstructFacesSystem.columns)
    return InstructFacesSystem(base, adapter, before, options, some)


class InstructFacesSystem:
    """Trains the resampler of an Instruct adapter to say who is seen; K' and V' stay as they are."""

    columns = ("condition_states", "instruction_ids", "text_ids", *FACE_COLUMNS)
    rows_at_once: int | None = None

    def __init__(
        self,
        base: Base,
        adapter: ImagePromptAdapter,
        before: ImagePromptAdapter,
        options: InstructFacesOptions,
        some: dict[str, Tensor],
    ) -> None:
        """before: the adapter as it was. some: rows of the data, for the deviation of what it says."""
        self.base = base
        self.adapter = adapter
        self.options = options
        self._before = before
        self._empty_ids = base.tokenize([""]).to(base.device)
        with torch.no_grad():
            there = {name: values.to(base.device) for name, values in some.items()}
            said = self._before.tokens(*self._read(there)).float()
            self._deviation = said.std((0, 1)).clamp(min=SMALLEST_DEVIATION)
        self._reader = nn.Linear(said.shape[-1], some["id_embeds"].shape[-1]).to(base.device)
        self.module: nn.Module = nn.ModuleList([adapter.image_proj, self._reader])

    @torch.no_grad()
    def _read(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return what_is_read(self.base, batch, self.options.instruction_embedding)

    def _errors(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of each row what the tokens lost, squared, and 1 - cos to the identity vector, (batch,) each."""
        conditions = self._read(batch)
        said = self.adapter.tokens(*conditions).float()
        with torch.no_grad():
            before = self._before.tokens(*conditions).float()
        lost = ((said - before) / self._deviation).square().mean((1, 2))
        wanted = batch["id_embeds"].float()
        return lost, 1 - functional.cosine_similarity(self._reader(said.mean(1)), wanted)

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        """What of the faces cannot be read, and what of all rows' tokens is lost."""
        no_text = randomness.uniform("drop") < self.options.drop_text
        text_ids = replace_rows(batch["text_ids"], self._empty_ids, no_text)
        lost, unlike = self._errors({**batch, "text_ids": text_ids})
        is_face = batch["task_ids"] == FACE
        lost = (torch.where(is_face, HOLD_OF_FACES, 1.0) * lost).mean()
        unlike = torch.where(is_face, unlike, 0.0).mean()
        figures: Figures = {"lost": lost.detach(), "unlike": unlike.detach()}
        return lost + self.options.identity_weight * unlike, figures

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """Of held-out faces how unlike the vector is that is read, of the others what the tokens lost.

        Where there is no face, or nothing else, there is no figure of it.
        """
        is_face = batch["task_ids"] == FACE
        asked = {}
        if not is_face.all():
            asked["lost_of_before"] = (self._lost_of_others, batch)
        if is_face.any():
            asked["unlike"] = (self._unlike_of_faces, batch)
        return means_in_parts(asked, randomness, rows_at_once=self.rows_at_once)

    def _lost_of_others(self, batch: dict[str, Tensor], _: Randomness) -> Tensor:
        return self._errors(batch)[0][batch["task_ids"] != FACE]

    def _unlike_of_faces(self, batch: dict[str, Tensor], _: Randomness) -> Tensor:
        return self._errors(batch)[1][batch["task_ids"] == FACE]

    def export(self, path: Path) -> None:
        """Write the adapter, for `systems.instruct` to start from."""
        save_adapter(self.adapter, path, made_for(self.base))
