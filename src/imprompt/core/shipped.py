"""What comes with the package for the embedded world: the base, judges, adapters, by name."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from imprompt.core.errors import ImpromptError

WEIGHTS = Path(__file__).parent.parent / "weights"
# What may be said in the place of a file or a folder.
ADAPTERS = {
    "diorama": "diorama-ip-adapter.safetensors",
    "diorama-instruct": "diorama-ip-adapter-instruct.safetensors",
}
IDENTITIES = {"diorama": "diorama-identity"}
CONTROLS = {
    "diorama-depth": "diorama-t2i-depth",
    "diorama-segmentation": "diorama-controlnet-segmentation",
}


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


def file_or_shipped(path: str | PathLike[str], names: Mapping[str, str]) -> Path:
    """The path as it is; or, if it is one of the `names` and no file of one's own, what is shipped.

    Raises:
        ImpromptError: this installation lacks it.
    """
    is_name = str(path) in names and not Path(path).exists()
    return shipped(names[str(path)]) if is_name else Path(path)
