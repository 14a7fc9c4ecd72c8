"""What comes with the package for the diorama base: adapters, and what keeps persons."""

from pathlib import Path

from imprompt.core.errors import ImpromptError

IDENTITY_FOLDER = Path(__file__).parent.parent / "weights" / "diorama-identity"
FILE = Path(__file__).parent.parent / "weights" / "diorama-ip-adapter.safetensors"


def shipped_adapter() -> Path:
    """The adapter file that was trained longer than the quickstart's.

    Raises:
        ImpromptError: this installation has none.
    """
    if not FILE.is_file():
        raise ImpromptError(f"This installation lacks the diorama adapter ({FILE}): install again.")
    return FILE


def shipped_identity() -> Path:
    """The folder of identity adapter and IdentityNet.

    Raises:
        ImpromptError: this installation has none.
    """
    if not IDENTITY_FOLDER.is_dir():
        raise ImpromptError(
            f"This installation lacks the diorama identity ({IDENTITY_FOLDER}): install again, or "
            "train it: imprompt train identity --preset diorama-identity."
        )
    return IDENTITY_FOLDER


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
