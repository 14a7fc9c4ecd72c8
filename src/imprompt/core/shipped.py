"""What comes with the package for the embedded world: the base, judges, adapters, by name."""

from pathlib import Path

from imprompt.core.errors import ImpromptError

WEIGHTS = Path(__file__).parent.parent / "weights"


def shipped(name: str) -> Path:
    """The file or folder of this name.

    Raises:
        ImpromptError: this installation lacks it.
    """
    path = WEIGHTS / name
    if not path.exists():
        raise ImpromptError(
            f"This installation lacks {name} (looked for in {WEIGHTS}): install the package again."
        )
    return path
