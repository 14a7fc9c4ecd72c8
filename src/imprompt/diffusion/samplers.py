"""Samplers by name: diffusers' schedulers, set up from what a base was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from imprompt.core.errors import ImpromptError

SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class _Kind:
    """What is known of a sampler: diffusers' class, what it needs beyond the base's configuration, and what
    it cannot do."""

    class_name: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    draws_noise: bool = False
    """Whether it takes fresh noise at every step."""
    has_karras_sigmas: bool = False
    has_spacing: bool = True
    needs_noise: bool = False
    """Whether it must know the noise, and does not do with a denoiser that predicts x0."""
    ends_in_noise: bool = True
    """Whether it knows schedules of which the last timestep is noise alone."""


SAMPLERS: dict[str, _Kind] = {
    "ddim": _Kind("DDIMScheduler", {"clip_sample": False}),
    "dpm-solver++": _Kind(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++"},
        has_karras_sigmas=True,
    ),
    "pndm": _Kind("PNDMScheduler", {"skip_prk_steps": True}, needs_noise=True, ends_in_noise=False),
    "euler": _Kind("EulerDiscreteScheduler", has_karras_sigmas=True),
    "euler-ancestral": _Kind("EulerAncestralDiscreteScheduler", draws_noise=True, needs_noise=True),
    "ddpm": _Kind("DDPMScheduler", {"clip_sample": False}, draws_noise=True),
    "lcm": _Kind("LCMScheduler", {"clip_sample": False}, draws_noise=True, has_spacing=False),
}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler by its name, where something about it shall differ from what the base says."""

    name: str = "ddim"
    timestep_spacing: str | None = None
    """Which of the timesteps of training its steps are: "leading", "trailing" or "linspace", by default as the
    base's scheduler says. Models and LoRAs of few steps (Lightning, Hyper, Turbo) want "trailing".
    Source: Lin et al. (2305.08891), table 2."""
    karras_sigmas: bool = False
    """Whether the levels of noise go down as Karras et al. (2206.00364), equation 5, say; for "euler" and
    "dpm-solver++"."""


def create_sampler(
    sampler: str | Sampler, scheduler_config: Mapping[str, Any], num_steps: int
) -> Any:
    """A diffusers scheduler, ready to go through `num_steps` steps (its `.timesteps`).

    `scheduler_config` is that of the base's own scheduler, of whichever kind: it tells the noise
    schedule and what the denoiser predicts. All its tables stay on the CPU, even if the latents are
    elsewhere, so that looking something up never waits for the device.

    Raises:
        ImpromptError: there is no sampler of this name, or it cannot take so many steps or what is asked of it,
            or it is not for what this denoiser predicts.

    Source: ddim: Song et al. (2010.02502); dpm-solver++: Lu et al. (2211.01095); pndm: Liu et al.
    (2202.09778); euler: Karras et al. (2206.00364) algorithm 2 without churn; euler-ancestral: the same
    with a step of the reverse process's noise, as k-diffusion has it; ddpm: Ho et al. (2006.11239); lcm:
    Luo et al. (2310.04378) algorithm 3.
    """
    sampler = Sampler(name=sampler) if isinstance(sampler, str) else sampler
    name = sampler.name
    if name not in SAMPLERS:
        raise ImpromptError(f"There is no sampler {name!r}; use one of {', '.join(SAMPLERS)}.")
    num_train_timesteps = scheduler_config.get("num_train_timesteps", 1000)
    if not 1 <= num_steps <= num_train_timesteps:
        raise ImpromptError(
            f"{num_steps} sampling steps were asked for; allowed are 1 to {num_train_timesteps}."
        )
    import diffusers

    options = _options(sampler, scheduler_config)
    if name == "lcm":
        # Of how many timesteps, evenly spaced, it may take some: as many as were distilled, or more if asked.
        distilled = scheduler_config.get("original_inference_steps", 50)
        options["original_inference_steps"] = max(distilled, num_steps)
    kind: Any = getattr(diffusers, SAMPLERS[name].class_name)
    scheduler: Any = kind.from_config(scheduler_config, **options)
    scheduler.set_timesteps(num_steps)
    if int(scheduler.timesteps.max()) >= num_train_timesteps:
        # Steps without a gap leave no room for the offset that most models want.
        scheduler = kind.from_config(scheduler.config, steps_offset=0)
        scheduler.set_timesteps(num_steps)
    return scheduler


def _options(sampler: Sampler, scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """What the scheduler is set to beyond the base's configuration; an ImpromptError if it cannot be."""
    name, kind = sampler.name, SAMPLERS[sampler.name]
    options = dict(kind.options)
    if kind.needs_noise and scheduler_config.get("prediction_type") == "sample":
        raise ImpromptError(
            f"The sampler {name!r} needs a model that predicts ε or v; use another."
        )
    if not kind.ends_in_noise and scheduler_config.get("rescale_betas_zero_snr"):
        raise ImpromptError(
            f"The sampler {name!r} does not know schedules that end in noise alone, as this model's does; "
            "use another."
        )
    if sampler.timestep_spacing is not None:
        if sampler.timestep_spacing not in SPACINGS:
            raise ImpromptError(
                f"timestep_spacing is {sampler.timestep_spacing!r}; use one of {', '.join(SPACINGS)}."
            )
        if not kind.has_spacing:
            raise ImpromptError(f"The sampler {name!r} has a spacing of its own; leave it out.")
        options["timestep_spacing"] = sampler.timestep_spacing
    if sampler.karras_sigmas:
        if not kind.has_karras_sigmas:
            able = ", ".join(other for other, of in SAMPLERS.items() if of.has_karras_sigmas)
            raise ImpromptError(f"karras_sigmas are for the samplers {able}, not for {name!r}.")
        options["use_karras_sigmas"] = True
    return options


def uses_noise(sampler: str | Sampler) -> bool:
    """Whether a sampler draws fresh noise at every step."""
    return SAMPLERS[sampler if isinstance(sampler, str) else sampler.name].draws_noise
