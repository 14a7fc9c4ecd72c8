"""IP-Adapter-Instruct: an instruction says what of the image is meant: its style, its object, all of it.

Shown a condition image, told what to take from it and what else to draw, the frozen base predicts the
noise on a target that has just this of the image and the rest of the text. The resampler, which reads
image, prompt and instruction, and K', V' at each cross-attention site learn; all tasks at once.

Source: IP-Adapter-Instruct (2408.03209), section 3. No training code was published.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter, add_lora, create_adapter
from imprompt.bases import Base, TextStates, image_encoder_of
from imprompt.checkpoints import load_adapter, save_adapter
from imprompt.core.config import check_range, check_shares
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.instructions import TASKS
from imprompt.data.rows import Rows
from imprompt.diffusion.guidance import guide
from imprompt.encoders.instruction import EMBEDDINGS, METADATA_KEY, instruction_states
from imprompt.systems.denoising import (
    Attempt,
    Denoising,
    check_same_base,
    drawn_shares,
    made_for,
    mean_in_parts,
    replace_rows,
    sample_posterior,
    text_states_of,
)
from imprompt.systems.drawn import drawn_clean
from imprompt.systems.instruct_growth import begun_as_plus, text_width, with_positions
from imprompt.systems.likeness import MIN_SIGNAL, Likeness, likeness_for
from imprompt.systems.protocol import Figures

SMALLEST_DEVIATION = 1e-3  # of what tokens say, where their errors are counted in units of it
FACE = TASKS.index("face")
FACE_COLUMNS = ("task_ids", "id_embeds")


@dataclass(frozen=True, kw_only=True)
class InstructOptions:
    """What is trained. The defaults are the paper's where it tells them."""

    num_tokens: int = 16
    """Tokens per image. This and the next two are of a new adapter: one in `start_from` has its own."""
    resampler_dim: int = 0
    """Inner width of the resampler, a multiple of 64; 0 takes the text's width."""
    depth: int = 4
    """Layers of the resampler."""
    positions: bool = False
    """Whether the resampler learns where in the picture each state of the image encoder stands. Not of the
    paper: CLIP ViT-H's states tell it, those of a small encoder may not."""
    instruction_embedding: str = "tokens"
    """`tokens` (a state for each token, as published) or `pooled` (one for the whole instruction)."""
    drop_image: float = 0.05
    """Share of samples that do not see the image."""
    drop_text: float = 0.05
    """Share of samples that see no text."""
    drop_instruction: float = 0.05
    """Share of samples that are not told what to take from the image."""
    drop_all: float = 0.05
    """Share of samples that see nothing, for classifier-free guidance."""
    snr_gamma: float = 0.0
    """γ of min-SNR weighting (2303.09556); 0 weighs all timesteps alike."""
    lora_rank: int = 0
    """Of low-rank additions at every attention layer, as face-id adapters have them. Not of the paper. 0 is
    none, or that of `start_from`."""
    likeness: float = 0.0
    """Weight of a second loss in lessons of faces, that the face encoder knows the person in what is
    predicted. Not of the paper. Such data have the columns id_embeds, of what shall be drawn, and task_ids."""
    likeness_steps: int = 0
    """In how many steps a portrait is drawn from noise for it, each as far as one of them, guided as the base
    is; what is predicted there is looked at. 0 looks at what is predicted for the noisy target."""
    hold: float = 0.0
    """Weight of a third loss, that what is predicted in lessons other than faces moves away from what the
    adapter in `hold_to` predicts there: what likeness asks for would cost them. Such data have task_ids."""
    hold_to: str = ""
    """The Instruct adapter that these are held to; empty is that in `start_from`."""
    start_from: str = ""
    """An Instruct adapter to go on from, or a Plus adapter to begin as; empty starts anew."""

    def __post_init__(self) -> None:
        check_shares(self, ("drop_image", "drop_text", "drop_instruction", "drop_all"))
        check_range(self, ("num_tokens", "depth"), 1)
        check_range(
            self, ("resampler_dim", "snr_gamma", "lora_rank", "likeness", "likeness_steps"), 0
        )
        if self.likeness_steps and not self.likeness:
            raise ImpromptError("likeness_steps is about likeness, whose weight is 0.")
        if self.hold and not (self.hold_to or self.start_from):
            raise ImpromptError("hold is about the adapter in hold_to or start_from; name one.")


def build(options: InstructOptions, base: Base, columns: Rows) -> InstructSystem:
    """The system for prepared data: an Instruct adapter of the right shape, new or from a file.

    Raises:
        ImpromptError: data of another base, a base without image encoder, a file of another variant; data
            without what `likeness` reads.
    """
    check_same_base(columns, base)
    if options.likeness:
        columns.require(FACE_COLUMNS)
    likeness = likeness_for(columns, base, options.likeness)
    before = None
    if options.hold:
        columns.require(("task_ids",))
        held = replace(options, start_from=options.hold_to or options.start_from)
        before = InstructSystem(base, instruct_adapter(held, base), held)
    return InstructSystem(base, instruct_adapter(options, base), options, likeness, before)


def instruct_adapter(options: InstructOptions, base: Base) -> ImagePromptAdapter:
    """The adapter that the options ask for: new, read from a file, or begun as a Plus adapter.

    Raises:
        ImpromptError: a base without image encoder, or a file that does not fit.
    """
    if options.instruction_embedding not in EMBEDDINGS:
        raise ImpromptError(
            f"instruction_embedding is {options.instruction_embedding!r}; choose "
            f"{' or '.join(EMBEDDINGS)}."
        )
    encoder = image_encoder_of(base)
    num_positions = encoder.zero_hidden_states().shape[1] if options.positions else 0
    if options.start_from:
        adapter = load_adapter(options.start_from)
        if adapter.variant == "plus":
            adapter = begun_as_plus(adapter, base)
        elif adapter.variant != "instruct":
            raise ImpromptError(
                f"{options.start_from} is a {adapter.variant} adapter; Instruct goes on from "
                "instruct or begins as plus."
            )
        width = adapter.projection.features[1].dim
        if width != text_width(base):
            raise ImpromptError(
                f"{options.start_from} reads texts in states of {width} numbers, and the first text "
                f"encoder of {base.name} gives {text_width(base)}: it was made for another base."
            )
        told = adapter.metadata.get(METADATA_KEY, options.instruction_embedding)
        if told != options.instruction_embedding:
            raise ImpromptError(
                f"{options.start_from} reads instructions as {told}; set "
                f"system.instruction_embedding={told}."
            )
        if num_positions and adapter.projection.features[0].length is None:
            adapter = with_positions(adapter, base, num_positions)
    else:
        adapter = create_adapter(
            base.unet,
            "instruct",
            feature_dim=encoder.hidden_dim,
            num_tokens=options.num_tokens,
            resampler_dim=options.resampler_dim or None,
            depth=options.depth,
            num_positions=num_positions,
            text_dim=text_width(base),
        )
    if options.lora_rank and options.lora_rank != adapter.lora_rank:
        adapter = add_lora(adapter, base.unet, options.lora_rank)
    adapter.metadata[METADATA_KEY] = options.instruction_embedding
    return adapter.to(base.device)


class InstructSystem:
    """Trains an Instruct adapter on pairs with a condition image and an instruction."""

    def __init__(
        self,
        base: Base,
        adapter: ImagePromptAdapter,
        options: InstructOptions,
        likeness: Likeness | None = None,
        before: InstructSystem | None = None,
    ) -> None:
        """before: that of the adapter that predictions are held to, where `options.hold` is not 0."""
        self.base = base
        self.module = adapter
        self.options = options
        self.columns = (
            "latent_mean",
            "latent_logvar",
            "condition_states",
            "instruction_ids",
            "text_ids",
            *(("task_ids",) if likeness or before else ()),
            *(("id_embeds",) if likeness else ()),
        )
        self._likeness = likeness
        self._before = before
        self.rows_at_once: int | None = None
        """How many rows are validated together; set by the loop, None is all."""
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
        loss = (weights * attempt.errors).mean()
        figures: Figures = {}
        if self._likeness is not None:
            seen = (batch["task_ids"] == FACE) & ~no_image & ~no_instruction
            if self.options.likeness_steps:
                clean = self._drawn(batch, randomness, seen.nonzero()[:, 0].tolist())
            else:
                seen &= attempt.signal > MIN_SIGNAL
                clean = attempt.clean[seen]
            id_embeds = batch["id_embeds"][seen].float()
            loss, figures = self._likeness.beside(loss, clean, id_embeds, len(seen))
        if self._before is not None:
            moved = self._moved(self._before, batch, attempt, timesteps)
            loss, figures = loss + self.options.hold * moved, {**figures, "moved": moved.detach()}
        return loss, figures

    def _moved(
        self, before: InstructSystem, batch: dict[str, Tensor], attempt: Attempt, timesteps: Tensor
    ) -> Tensor:
        """How far predictions are from what they were, squared, in lessons of no face: the sum over these,
        of which there may be none, divided by the number of all."""
        rows = (batch["task_ids"] != FACE).nonzero()[:, 0]
        if not len(rows):
            return attempt.errors.new_zeros(())
        batch = {name: values[rows] for name, values in batch.items()}
        with torch.no_grad():
            was = before._predict(batch, attempt.noisy[rows], timesteps[rows]).float()
        moved = (attempt.prediction[rows].float() - was).square().mean((1, 2, 3))
        return moved.sum() / len(timesteps)

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
            num_steps=self.options.likeness_steps,
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
        figures: dict[str, float] = {}
        for name, given in (
            ("loss_with_image", batch),
            ("loss_with_another_instruction", other),
            ("loss_with_image_alone", without(batch, never, always, never, *nothing)),
            ("loss_without_image", without(batch, always, never, always, *nothing)),
        ):
            figures[name] = mean_in_parts(
                self._errors, given, randomness, timesteps, rows_at_once=self.rows_at_once
            )
        return figures

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
    image, text, instruction, everything = drawn_shares(
        randomness.uniform("drop"),
        (options.drop_image, options.drop_text, options.drop_instruction, options.drop_all),
    )
    return image | everything, text | everything, instruction | everything


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
