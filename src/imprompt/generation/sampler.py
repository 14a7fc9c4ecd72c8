"""The denoising loop of generation: one for every base, sampler and kind of condition."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from imprompt.adapters.sites import Number
from imprompt.bases import Base, TextStates
from imprompt.core.errors import ImpromptError
from imprompt.core.progress import progress
from imprompt.core.randomness import Randomness, generator
from imprompt.diffusion.late_start import last_timesteps, noise_level
from imprompt.diffusion.samplers import Sampler, create_sampler, uses_noise
from imprompt.generation.branches import Guidance, stacked_text
from imprompt.generation.conditions import TokenPrompt, conditions_by_step
from imprompt.generation.controls import ControlRun, MapControl
from imprompt.generation.explanation import Explanation
from imprompt.generation.init_image import Start

# So many pixels are denoised at once by default. Beyond, a CPU's caches overflow and a small GPU's
# memory may.
PIXELS_PER_BATCH = 2 * 512 * 512
MAX_DEFAULT_BATCH_SIZE = 16


@torch.inference_mode()
def sample_latents(
    base: Base,
    text_states: TextStates,
    negative_text_states: TextStates | None = None,
    prompts: Sequence[TokenPrompt] = (),
    *,
    steps: int = 50,
    guidance_scale: Number = 7.5,
    image_guidance_scale: Number | None = None,
    instruction_guidance_scale: Number | None = None,
    guidance_rescale: Number = 0.0,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    sampler: str | Sampler = "ddim",
    size_px: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    show_progress: bool = False,
    explanation: Explanation | None = None,
    controls: Sequence[MapControl] = (),
    start: Start | None = None,
) -> Float[Tensor, "images channels h w"]:
    """Latents of one image for each of `text_states`, ready for `base.decode_image`.

    Image k starts from noise that is a function of `seed` and `indices[k]` (k itself by default),
    so it is the same whatever else is generated, in batches of whatever size.

    With `guidance_scale` 1 nothing unconditional is computed; otherwise `negative_text_states` (one
    for all images or one for each) are needed. `image_guidance_scale` guides towards the image
    prompts by another strength than towards the text, at the cost of a third branch, and
    `instruction_guidance_scale` towards what they are told, at the cost of a fourth. `explanation` is
    filled with where each prompt acted. `controls` add what they make of their maps. From a `start` only
    the last steps are gone, and these are all: spans of time are shares of them.

    Raises:
        ImpromptError: shapes do not fit each other, or sampler, steps or size are not possible.
    """
    num_images = len(text_states)
    indices = range(num_images) if indices is None else indices
    if len(indices) != num_images:
        raise ImpromptError(f"{len(indices)} indices were given for {num_images} images.")
    latent_shape = base.latent_shape(size_px)
    if batch_size is None:
        batch_size = default_batch_size(base, *latent_shape[1:])
    if batch_size < 1:
        raise ImpromptError(f"batch_size is {batch_size}, but must be at least 1.")
    # Made once before any work, for a mistake is told here, and pndm takes a step more than asked.
    share = 1.0 if start is None else start.strength
    num_steps = len(last_timesteps(create_sampler(sampler, base.scheduler.config, steps), share))
    # Prompts that were told something may all be silent, as in a sweep of their weight.
    if not any(prompt.uninstructed_tokens is not None for prompt in prompts):
        instruction_guidance_scale = None
    guidance = Guidance(
        scale=guidance_scale,
        image=image_guidance_scale,
        instruction=instruction_guidance_scale,
        rescaled=guidance_rescale,
    )
    branches = guidance.branches(has_prompts=bool(prompts))
    if branches[0] == "unconditional":
        if negative_text_states is None:
            raise ImpromptError(
                f"guidance_scale={guidance_scale} needs negative_text_states, for example those of "
                "the empty text; only guidance_scale=1 does without."
            )
        if len(negative_text_states) not in (1, num_images):
            raise ImpromptError(
                f"{len(negative_text_states)} negative_text_states were given for {num_images} "
                "images: give one for all or one for each."
            )

    if explanation is not None:
        explanation.begin(num_images, *latent_shape[1:])
    batches: list[Tensor] = []
    num_batches = -(-num_images // batch_size)
    description = "generate" if num_images == 1 else f"generate {num_images} images"
    bar = (
        progress(num_batches * num_steps, description, unit="step")
        if show_progress
        else nullcontext()
    )
    with bar as shown:
        for first in range(0, num_images, batch_size):
            rows = slice(first, min(first + batch_size, num_images))
            text = stacked_text(text_states, negative_text_states, branches, rows)
            text = text.to(base.device, base.dtype)
            conditions = conditions_by_step(
                prompts,
                branches,
                rows,
                num_images,
                num_steps,
                explanation,
                text_states=text.sequence,
                latent_size=latent_shape[1:],
            )
            control_run = ControlRun(controls, base, branches, rows, num_images, num_steps, text)
            scheduler = create_sampler(sampler, base.scheduler.config, steps)
            timesteps = last_timesteps(scheduler, share)
            noise = initial_noise(seed, indices[rows], latent_shape).to(base.device, base.dtype)
            if start is None or share == 1:
                latents = noise * scheduler.init_noise_sigma
            else:
                latents = start.latents_with(noise, noise_level(scheduler, timesteps[0]))
            # The sampler reckons on the CPU; the networks would fetch each timestep from there, and wait for it.
            there = timesteps.to(
                base.device, torch.float32 if timesteps.is_floating_point() else None
            )
            extra = {}
            if uses_noise(sampler):
                extra["generator"] = _step_generators(seed, indices[rows])
            for step, timestep in enumerate(timesteps):
                scaled = scheduler.scale_model_input(latents, timestep)
                stacked = torch.cat([scaled] * len(branches)) if len(branches) > 1 else scaled
                residuals = control_run.residuals(stacked, there[step], step)
                output = base.denoise(stacked, there[step], text, conditions[step], residuals)
                output = guidance.of(output, branches)
                latents = scheduler.step(output, timestep, latents, return_dict=False, **extra)[0]
                if start is not None and start.mask is not None:
                    is_last = step + 1 == num_steps
                    level = (1.0, 0.0) if is_last else noise_level(scheduler, timesteps[step + 1])
                    kept = start.latents_with(noise, level).to(latents)
                    # A sampler may reckon in another precision than the denoiser.
                    latents = torch.lerp(kept, latents, start.mask.to(latents))
                if shown is not None:
                    shown.update(1)
            batches.append(latents)
    with torch.inference_mode(False):
        # A copy made outside inference mode may take part in training.
        return torch.cat(batches)


def initial_noise(
    seed: int, indices: Sequence[int], shape: tuple[int, ...]
) -> Float[Tensor, "images *shape"]:
    """Standard normal noise in float32, for each image a function of the seed and its index."""
    return Randomness(seed, indices).normal("initial noise", shape)


def default_batch_size(base: Base, height: int, width: int) -> int:
    """How many images with latents of this size to draw at once if nobody says."""
    pixels_per_latent = base.image_size_px // base.latent_shape()[1]
    num_pixels = height * width * pixels_per_latent**2
    return max(1, min(MAX_DEFAULT_BATCH_SIZE, PIXELS_PER_BATCH // num_pixels))


def _step_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One stream of noise per image, for the samplers that draw some at every step."""
    return [
        torch.Generator().manual_seed(int(generator(seed, index, "step noise").integers(2**63)))
        for index in indices
    ]
