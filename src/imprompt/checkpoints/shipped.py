"""The adapters that come with the package, for the diorama base."""

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


INSTRUCT_FILE = FILE.with_name("diorama-ip-adapter-instruct.safetensors")


def shipped_instruct_adapter() -> Path:
    """The Instruct adapter: it is told what to take from an image.

    Raises:
        ImpromptError: this installation has none.
    """
    if not INSTRUCT_FILE.is_file():
        raise ImpromptError(
            f"This installation lacks the diorama Instruct adapter ({INSTRUCT_FILE}); "
            "`imprompt train instruct` makes one."
        )
    return INSTRUCT_FILE
