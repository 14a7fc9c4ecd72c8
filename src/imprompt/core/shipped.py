"""From a name to a path: what comes with the package for the embedded world, a path that is here, or a place on
the hub."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from imprompt.core.errors import ImpromptError
from imprompt.core.hub import file_from_hub, folder_from_hub, place_on_hub

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


def file_named(name: str | PathLike[str], names: Mapping[str, str]) -> Path:
    """The file that is meant: a path; one of the `names` of what is shipped; or a file on the hub, as
    "owner/name:path/in/it".

    Raises:
        ImpromptError: this installation lacks it, or it is not to be had.
    """
    if str(name) in names and not Path(name).exists():
        return shipped(names[str(name)])
    place = place_on_hub(name)
    return file_from_hub(*place) if place is not None and place[1] else Path(name)


def folder_named(name: str | PathLike[str], names: Mapping[str, str], files: Sequence[str]) -> Path:
    """Like `file_named`, for a folder; of one on the hub ("owner/name" or "owner/name:folder") these `files` are
    fetched."""
    if str(name) in names and not Path(name).exists():
        return shipped(names[str(name)])
    place = place_on_hub(name)
    return Path(name) if place is None else folder_from_hub(*place, files)
