"""How a run is run. What is learned is the system's matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from imprompt.core.config import check_range
from imprompt.core.errors import ImpromptError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHOICES = {
    "schedule": ("constant", "cosine"),
    "precision": tuple(PRECISIONS),
    "frozen_precision": tuple(PRECISIONS),
    "optimizer": ("adamw", "adamw-8bit"),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The defaults of the optimiser are IP-Adapter's (2308.06721, section 4.1.2)."""

    steps: int
    """Optimiser steps in all."""
    batch_size: int = 32
    """Samples per step, of all processes together."""
    gradient_accumulation_steps: int = 1
    """Into how many parts a process's share of a batch is cut, to need less memory; what a step learns
    stays the same."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    optimizer: str = "adamw"
    """`adamw`, or `adamw-8bit` with moments in 8 bits (needs bitsandbytes and a GPU)."""
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
    """Gradients are scaled down to this norm; 0 turns it off, as in the authors' scripts, which trust the step size."""
    precision: str = "float32"
    """`float32`; or `bfloat16` or `float16` for autocast, the latter with a scaled loss."""
    frozen_precision: str = "float32"
    """In what the base, which does not learn, is kept: half of the memory in the precision of training,
    which must be a half one, too."""
    gradient_checkpointing: bool = False
    """Compute the denoiser's activations, and a ControlNet's, again for the gradient instead of keeping
    them."""
    compile_blocks: bool = False
    """Compile the denoiser's transformer blocks, and a ControlNet's (torch.compile), all of which share
    one program."""
    seed: int = 0
    """Decides the order of rows, noise, timesteps, drops: everything random."""
    log_every_steps: int = 20
    """How often figures are written; they are means over these steps."""
    checkpoint_every_steps: int = 500
    """A killed run loses at most these many steps."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted."""
    validate_every_steps: int = 500
    """How often held-out rows are looked at, and a preview is drawn."""
    validation_rows: int = 64
    """The last rows of the data are held out for validation."""
    preview_images: int = 4
    """How many pictures are drawn at each validation, where a system can draw, at most as many as rows are
    held out; 0 draws none."""
    best_by: str = ""
    """Which validation figure decides what is kept as `best`: `lowest:NAME` or `highest:NAME`; empty
    takes the lowest of the first figure whose name begins with loss or error."""
    read_ahead: int = 2
    """Batches that are read while others are used."""
    report_to: str = "auto"
    """Trackers of accelerate's, such as `tensorboard` or `wandb,mlflow`; `auto` is TensorBoard if it is
    installed, `none` is none."""

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every_steps",
            "checkpoint_every_steps",
            "keep_checkpoints",
            "validate_every_steps",
            "read_ahead",
        )
        check_range(self, counts, 1)
        may_be_zero = ("warmup_steps", "validation_rows", "preview_images")
        check_range(self, (*may_be_zero, "weight_decay", "max_gradient_norm"), 0)
        check_range(self, ("learning_rate", "weight_decay", "max_gradient_norm"))
        check_range(self, ("ema_decay", "beta2"), 0, below=1)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ImpromptError(f"{name} is {getattr(self, name)!r}; use {', '.join(choices)}.")
        if self.frozen_precision != "float32" and self.precision == "float32":
            raise ImpromptError(
                f"frozen_precision is {self.frozen_precision!r}, which goes with half precision: "
                f"set precision={self.frozen_precision}, too."
            )
        if not self.learning_rate > 0:
            raise ImpromptError(f"learning_rate is {self.learning_rate}, but must be positive.")
        if self.best_by and self.best_by.partition(":")[0] not in ("lowest", "highest"):
            raise ImpromptError(
                f"best_by is {self.best_by!r}; write lowest:NAME or highest:NAME, such as "
                "lowest:loss_with_image."
            )


# What may change between a run and its continuation: it changes what is learned by rounding at most. (A
# system whose rows are coupled keeps the number of parts: see `describe`. `steps` may change, too, where the
# schedule does not depend on it.)
FREE_TO_CHANGE = (
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "compile_blocks",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "validate_every_steps",
    "preview_images",
    "read_ahead",
    "report_to",
)
