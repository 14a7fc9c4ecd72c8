"""The base that comes with the package: a small latent diffusion model of the embedded world."""

from pathlib import Path

from imprompt.core.shipped import shipped

# At the 7.5 of larger models its colours run over, and at 5 styles and settings suffer a little.
GUIDANCE_SCALE = 3.0


def diorama_folder() -> Path:
    """The diffusers folder of the embedded base.

    Raises:
        ImpromptError: this installation has none.
    """
    return shipped("diorama-base")
