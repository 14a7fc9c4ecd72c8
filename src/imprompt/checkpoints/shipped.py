"""The adapter that comes with the package, for the diorama base."""

from pathlib import Path

from imprompt.core.errors import ImpromptError

FILE = Path(__file__).parent.parent / "weights" / "diorama-ip-adapter.safetensors"


def shipped_adapter() -> Path:
    """The adapter file that was trained longer than the quickstart's.

    Raises:
        ImpromptError: this installation has none.
    """
    if not FILE.is_file():
        raise ImpromptError(f"This installation lacks the diorama adapter ({FILE}): install again.")
    return FILE
