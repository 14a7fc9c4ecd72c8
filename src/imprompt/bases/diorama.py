"""The base that comes with the package: a small latent diffusion model of the embedded world."""

from pathlib import Path

from imprompt.core.errors import ImpromptError

# At the 7.5 of larger models its colours run over.
GUIDANCE_SCALE = 4.0
FOLDER = Path(__file__).parent.parent / "weights" / "diorama-base"


def diorama_folder() -> Path:
    """The diffusers folder of the embedded base.

    Raises:
        ImpromptError: this installation has none.
    """
    if not (FOLDER / "model_index.json").is_file():
        raise ImpromptError(
            f"This installation lacks the diorama base's weights ({FOLDER}): install the package "
            "again, or train the base as the documentation tells."
        )
    return FOLDER
