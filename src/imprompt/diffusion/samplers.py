"""Samplers by name: diffusers' schedulers, set up from what a base was trained with."""

from collections.abc import Mapping
from typing import Any

from imprompt.core.errors import ImpromptError

# Name → diffusers' class and what it needs beyond the base's configuration.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
}


def create_sampler(name: str, scheduler_config: Mapping[str, Any], num_steps: int) -> Any:
    """A diffusers scheduler, ready to go through `num_steps` steps (its `.timesteps`).

    `scheduler_config` is that of the base's own scheduler, of whichever kind: it tells the noise
    schedule and what the denoiser predicts. All its tables stay on the CPU, even if the latents are
    elsewhere, so that looking something up never waits for the device.

    Raises:
        ImpromptError: there is no sampler of this name, or it cannot take so many steps, or it is
            not for what this denoiser predicts.

    Source: ddim: Song et al. (2010.02502); dpm-solver++: Lu et al. (2211.01095); pndm: Liu et al.
    (2202.09778); euler: Karras et al. (2206.00364) algorithm 2 without churn; ddpm: Ho et al.
    (2006.11239).
    """
    if name not in SAMPLERS:
        raise ImpromptError(f"There is no sampler {name!r}; use one of {', '.join(SAMPLERS)}.")
    num_train_timesteps = scheduler_config.get("num_train_timesteps", 1000)
    if not 1 <= num_steps <= num_train_timesteps:
        raise ImpromptError(
            f"{num_steps} sampling steps were asked for; allowed are 1 to {num_train_timesteps}."
        )
    if name == "pndm" and scheduler_config.get("prediction_type") == "sample":
        raise ImpromptError("The sampler 'pndm' needs a model that predicts ε or v; use another.")
    import diffusers

    class_name, options = SAMPLERS[name]
    kind: Any = getattr(diffusers, class_name)
    scheduler: Any = kind.from_config(scheduler_config, **options)
    scheduler.set_timesteps(num_steps)
    if int(scheduler.timesteps.max()) >= num_train_timesteps:
        # Steps without a gap leave no room for the offset that most models want.
        scheduler = kind.from_config(scheduler.config, steps_offset=0)
        scheduler.set_timesteps(num_steps)
    return scheduler


def uses_noise(name: str) -> bool:
    """Whether a sampler draws fresh noise at every step."""
    return name == "ddpm"
