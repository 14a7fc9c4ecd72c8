"""IP-Adapter-Instruct: an instruction says what of the image is meant: its style, its object, all of it.

Shown a condition image, told what to take from it and what else to draw, the frozen base predicts the
noise on a target that has just this of the image and the rest of the text. The resampler, which reads
image, prompt and instruction, and K', V' at each cross-attention site learn; all tasks at once.

Source: IP-Adapter-Instruct (2408.03209), section 3. No training code was published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter
from imprompt.bases import Base, TextStates, image_encoder_of
from imprompt.checkpoints import save_adapter
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.instructions import TASKS
from imprompt.data.rows import Rows
from imprompt.diffusion.guidance import guide
from imprompt.encoders.instruction import instruction_states
from imprompt.systems.denoising import (
    Attempt,
    Denoising,
    check_same_encoders,
    drawn_shares,
    made_for,
    means_in_parts,
    replace_rows,
    sample_posterior,
    share_moved,
    text_states_of,
)
from imprompt.systems.drawn import drawn_clean
from imprompt.systems.instruct_growth import instruct_adapter
from imprompt.systems.instruct_options import DROPS, InstructOptions
from imprompt.systems.likeness import MIN_SIGNAL, Likeness, likeness_for
from imprompt.systems.perceptual import PortraitLook, portrait_look
from imprompt.systems.protocol import Figures
from imprompt.systems.resemblance import resemblance_for

SMALLEST_DEVIATION = 1e-3  # of what tokens say, where their errors are counted in units of it
EVERYTHING, FACE = TASKS.index("everything"), TASKS.index("face")
FACE_COLUMNS = ("task_ids", "id_embeds")


def build(options: InstructOptions, base: Base, columns: Rows) -> InstructSystem:
    """The system for prepared data: an Instruct adapter of the right shape, new or from a file.

    Raises:
        ImpromptError: data of another base, a base without image encoder, a file of another variant; data
            without what `likeness`, `resemblance`, `perceptual` or `hold` read, or no adapter to hold to.
    """
    check_same_encoders(columns, base)
    if options.likeness:
        columns.require(FACE_COLUMNS)
    if options.resemblance or options.perceptual or options.hold:
        columns.require(("task_ids",))
    before = None
    if options.hold:
        if not (options.hold_to or options.start_from):
            raise ImpromptError(
                "system.hold is about an adapter: name it in system.hold_to or system.start_from."
            )
        held = replace(options, start_from=options.hold_to or options.start_from)
        before = InstructSystem(base, instruct_adapter(held, base), held)
    adapter, looks = instruct_adapter(options, base), looks_for(columns, base, options)
    portraits = portrait_look(base) if options.perceptual else None
    return InstructSystem(base, adapter, options, looks=looks, portraits=portraits, before=before)


@dataclass(frozen=True)
class Look:
    """Lessons of one task, in which an encoder looks at what is predicted."""

    figure: str
    task: int
    likeness: Likeness
    wanted: Callable[[dict[str, Tensor]], Tensor]
    """Of a batch what should be seen, (batch, dim)."""
    has_text: bool
    """Whether it is drawn with the text, or the image has to say all."""


def looks_for(columns: Rows, base: Base, options: InstructOptions) -> list[Look]:
    """What is looked at, as the options say: persons by the face encoder, all else by the image encoder."""
    looks = []
    if likeness := likeness_for(columns, base, options.likeness):
        looks.append(
            Look(
                figure="loss_of_likeness",
                task=FACE,
                likeness=likeness,
                wanted=lambda batch: batch["id_embeds"],
                has_text=True,
            )
        )
    if resemblance := resemblance_for(columns, base, options.resemblance):
        looks.append(
            Look(
                figure="loss_of_resemblance",
                task=EVERYTHING,
                likeness=resemblance.likeness,
                wanted=lambda batch: resemblance.varying(batch["condition_states"]),
                has_text=False,
            )
        )
    return looks


class InstructSystem:
    """Trains an Instruct adapter on pairs with a condition image and an instruction."""

    rows_at_once: int | None = None

    def __init__(
        self,
        base: Base,
        adapter: ImagePromptAdapter,
        options: InstructOptions,
        *,
        looks: Sequence[Look] = (),
        portraits: PortraitLook | None = None,
        before: InstructSystem | None = None,
    ) -> None:
        """
        Args:
            looks: what is learnt beside the noise.
            portraits: what is learnt of faces beside the noise, of what is predicted for the noisy target.
            before: the system of the adapter that predictions are held to, but for those of faces.
        """
        self.base = base
        self.module = adapter
        self.options = options
        self.columns = (
            "latent_mean",
            "latent_logvar",
            "condition_states",
            "instruction_ids",
            "text_ids",
            *(("task_ids",) if looks or portraits or before else ()),
            *(("id_embeds",) if options.likeness else ()),
        )
        self.calls_differ = before is not None or bool(options.drawn_steps)
        self._looks = looks
        self._portraits = portraits
        self._before = before
        self._handle = adapter.install(base.unet)
        self._no_image = image_encoder_of(base).zero_hidden_states().float().to(base.device)
        self._empty_ids = base.tokenize([""]).to(base.device)
        self._denoising = Denoising(base.scheduler, base.device)

    def loss(self, batch: dict[str, Tensor], randomness: Randomness) -> tuple[Tensor, Figures]:
        """The squared error of the prediction, with conditions dropped per sample."""
        no_image, no_text, no_instruction = drops(randomness, self.options)
        batch = without(batch, no_image, no_text, no_instruction, self._no_image, self._empty_ids)
        timesteps = self._denoising.draw_timesteps(randomness)
        attempt = self._attempt(batch, randomness, timesteps)
        weights = self._denoising.weights(timesteps, self.options.snr_gamma)
        of_noise = (weights * attempt.errors).mean()
        told = ~no_image & ~no_instruction
        beside = self._looked_at(batch, randomness, attempt, told)
        if self._portraits is not None:
            unlike = self._portraits.share(attempt, told & (batch["task_ids"] == FACE))
            beside["loss_of_portraits"] = (self.options.perceptual, unlike)
        if self._before is not None:
            moved = self._moved(self._before, batch, attempt, timesteps)
            beside["loss_of_hold"] = (self.options.hold, moved)
        if not beside:
            return of_noise, {}
        loss = of_noise + sum(weight * part for weight, part in beside.values())
        figures: Figures = {name: part.detach() for name, (_, part) in beside.items()}
        return loss, {"loss_of_noise": of_noise.detach(), **figures}

    def _looked_at(
        self, batch: dict[str, Tensor], randomness: Randomness, attempt: Attempt, told: Tensor
    ) -> dict[str, tuple[float, Tensor]]:
        """Of each look its weight, and how unlike its lessons are to what they should be, by its figure's name.

        `told` marks the samples that have their image and instruction.
        """
        if not self._looks:
            return {}
        lessons = [told & (batch["task_ids"] == look.task) for look in self._looks]
        rows = torch.stack(lessons).any(0)
        if self.options.drawn_steps:
            clean = self._drawn(self._as_drawn(batch), randomness, rows.nonzero()[:, 0].tolist())
        else:
            rows = rows & (attempt.signal > MIN_SIGNAL)
            clean = attempt.clean[rows]
        unlike = {}
        for look, of_look in zip(self._looks, lessons, strict=True):
            wanted = look.wanted({name: values[rows & of_look] for name, values in batch.items()})
            share = look.likeness.share(clean[of_look[rows]], wanted, len(rows))
            unlike[look.figure] = (look.likeness.weight, share)
        return unlike

    def _as_drawn(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch as it is drawn to be looked at, with text where the look is one with text."""
        no_text = torch.zeros_like(batch["task_ids"], dtype=torch.bool)
        for look in self._looks:
            no_text |= (batch["task_ids"] == look.task) & (not look.has_text)
        return {**batch, "text_ids": replace_rows(batch["text_ids"], self._empty_ids, no_text)}

    def _moved(
        self, before: InstructSystem, batch: dict[str, Tensor], attempt: Attempt, timesteps: Tensor
    ) -> Tensor:
        """How far predictions are from what they were, in lessons of no face."""

        def predict_before(rows: Tensor) -> Tensor:
            some = {name: values[rows] for name, values in batch.items()}
            return before._predict(some, attempt.noisy[rows], timesteps[rows])

        return share_moved(attempt, batch["task_ids"] != FACE, predict_before)

    def _drawn(self, batch: dict[str, Tensor], randomness: Randomness, rows: list[int]) -> Tensor:
        """What these rows ask for, drawn from noise as generation does, x0 of one step with gradients."""
        shape = tuple(batch["latent_mean"].shape[1:])
        if not rows:
            return batch["latent_mean"].new_zeros(0, *shape)
        batch = {name: values[rows] for name, values in batch.items()}
        text_states = text_states_of(self.base, batch["text_ids"], batch)
        tokens = self.tokens(batch, text_states)
        nothing = self.nothing(batch)
        with torch.no_grad():
            no_text_states = text_states_of(self.base, nothing["text_ids"], nothing)
            no_tokens = self.tokens(nothing, no_text_states)

        def predict(noisy: Tensor, timesteps: Tensor, some: list[int]) -> Tensor:
            # What nothing is asked of must not learn to be unlike.
            with torch.no_grad():
                without = self._handle.condition(no_tokens[some])
                unasked = self.base.denoise(noisy, timesteps, no_text_states[some], without)
            condition = self._handle.condition(tokens[some])
            asked = self.base.denoise(noisy, timesteps, text_states[some], condition)
            return guide(unasked.float(), asked.float(), self.base.guidance_scale)

        return drawn_clean(
            predict,
            self._denoising,
            randomness.of(rows),
            shape,
            num_steps=self.options.drawn_steps,
            min_signal=MIN_SIGNAL,
        )

    def _errors(
        self, batch: dict[str, Tensor], randomness: Randomness, timesteps: Tensor
    ) -> Tensor:
        """The squared error of each sample's prediction, (batch,)."""
        return self._attempt(batch, randomness, timesteps).errors

    def _attempt(
        self, batch: dict[str, Tensor], randomness: Randomness, timesteps: Tensor
    ) -> Attempt:
        return self._denoising.attempt(
            lambda noisy: self._predict(batch, noisy, timesteps),
            sample_posterior(batch, randomness, self.base),
            randomness,
            timesteps,
        )

    def _predict(self, batch: dict[str, Tensor], noisy: Tensor, timesteps: Tensor) -> Tensor:
        """What the base predicts of noisy latents, shown and told what the batch says."""
        text_states = text_states_of(self.base, batch["text_ids"], batch)
        condition = self._handle.condition(self.tokens(batch, text_states))
        return self.base.denoise(noisy, timesteps, text_states, condition)

    def tokens(self, batch: dict[str, Tensor], text_states: TextStates) -> Tensor:
        """What the adapter makes of images, instructions and these texts, (batch, tokens, dim)."""
        embedding = self.options.instruction_embedding
        return self.module.tokens(*what_is_read(self.base, batch, embedding, text_states))

    def nothing(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same batch without image, text and instruction."""
        always = torch.ones(len(batch["text_ids"]), dtype=torch.bool, device=self.base.device)
        return without(batch, always, always, always, self._no_image, self._empty_ids)

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], randomness: Randomness) -> dict[str, float]:
        """The loss at evenly spread timesteps on fixed noise: as asked, asked for another thing, …

        An adapter that listens to instructions loses when it is told its neighbour's.
        """
        count = len(batch["text_ids"])
        timesteps = self._denoising.spread_timesteps(count)
        never = torch.zeros(count, dtype=torch.bool, device=timesteps.device)
        always = ~never
        nothing = (self._no_image, self._empty_ids)
        other = {**batch, "instruction_ids": batch["instruction_ids"].roll(1, 0)}
        alone = without(batch, never, always, never, *nothing)
        no_image = without(batch, always, never, always, *nothing)
        asked = {
            "loss_with_image": (self._errors, batch),
            "loss_with_another_instruction": (self._errors, other),
            "loss_with_image_alone": (self._errors, alone),
            "loss_without_image": (self._errors, no_image),
        }
        return means_in_parts(asked, randomness, timesteps, rows_at_once=self.rows_at_once)

    def export(self, path: Path) -> None:
        """Write the adapter with the official keys."""
        save_adapter(self.module, path, made_for(self.base))


def what_is_read(
    base: Base, batch: dict[str, Tensor], embedding: str, text_states: TextStates | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the resampler reads: states of the images, the instructions and the prompts.

    `text_states`, where they are known, need not be encoded again.
    """
    told = instruction_states(base, batch["instruction_ids"], embedding)
    prompts = base.instruct_states(batch["text_ids"], text_states)
    return batch["condition_states"].float(), told, prompts


def drops(randomness: Randomness, options: InstructOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Which samples lose their image, which their text, which their instruction: masks (batch,).

    One draw decides, so that the shares add up. A sample without an image keeps its instruction,
    unless it loses everything.
    """
    image, text, instruction, words, everything = drawn_shares(
        randomness.uniform("drop"), [getattr(options, name) for name in DROPS]
    )
    words |= everything
    return image | everything, text | words, instruction | words


def without(
    batch: dict[str, Tensor],
    no_image: Tensor,
    no_text: Tensor,
    no_instruction: Tensor,
    nothing: Tensor,
    empty_ids: Tensor,
) -> dict[str, Tensor]:
    """The batch with the marked rows' image, text or instruction replaced by none."""
    return {
        **batch,
        "condition_states": replace_rows(batch["condition_states"].float(), nothing, no_image),
        "text_ids": replace_rows(batch["text_ids"], empty_ids, no_text),
        "instruction_ids": replace_rows(batch["instruction_ids"], empty_ids, no_instruction),
    }
