"""How a run is run. What is learned is the system's matter."""

from __future__ import annotations

from dataclasses import dataclass

from imprompt.core.errors import ImpromptError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The defaults of the optimiser are IP-Adapter's (2308.06721, section 4.1.2)."""

    steps: int
    """Optimiser steps in all."""
    batch_size: int = 32
    """Samples per step."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    beta2: float = 0.999
    """Decay of AdamW's second moment; 0.99 suits short runs."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: str = "constant"
    """`constant` or `cosine` (down to 1 % at the last step)."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that is validated and exported; 0 turns it off."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns it off."""
    precision: str = "float32"
    """`float32`, or `bfloat16` for autocast."""
    seed: int = 0
    """Decides the order of rows, noise, timesteps, drops: everything random."""
    checkpoint_every_steps: int = 500
    """A killed run loses at most these many steps."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted."""
    validate_every_steps: int = 500
    """How often held-out rows are looked at."""
    validation_rows: int = 64
    """The last rows of the data are held out for validation."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "checkpoint_every_steps",
            "keep_checkpoints",
            "validate_every_steps",
        ):
            if getattr(self, name) < 1:
                raise ImpromptError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.schedule not in ("constant", "cosine"):
            raise ImpromptError(f"schedule is {self.schedule!r}; use constant or cosine.")
        if self.precision not in ("float32", "bfloat16"):
            raise ImpromptError(f"precision is {self.precision!r}; use float32 or bfloat16.")
        if not self.learning_rate > 0:
            raise ImpromptError(f"learning_rate is {self.learning_rate}, but must be positive.")
