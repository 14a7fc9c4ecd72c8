"""Files and folders of a model hub's repositories, fetched once and kept where the hub's library keeps them."""

# Strict but for what the hub's library leaves untyped:
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from imprompt.core.errors import ImpromptError, first_line

_PLACE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([^\s:]+))?")


def place_on_hub(name: str | PathLike[str]) -> tuple[str, str] | None:
    """Repository and what of it is meant ("" for all), of "owner/name" or "owner/name:path/in/it".

    None if it has another form, or if such a file or folder is here.
    """
    found = _PLACE.fullmatch(str(name))
    if found is None or Path(name).exists():
        return None
    return found[1], found[2] or ""


def is_on_hub(name: str | PathLike[str]) -> bool:
    """Whether this names a repository, or a part of one, and nothing that is here."""
    return place_on_hub(name) is not None


def is_file_on_hub(name: str | PathLike[str]) -> bool:
    """Whether this names a file of a repository: "owner/name:path/of/the/file"."""
    place = place_on_hub(name)
    return place is not None and place[1] != ""


def file_from_hub(repository: str, file: str) -> Path:
    """A file of a repository.

    Raises:
        ImpromptError: there is none, or no network.
    """
    from huggingface_hub import hf_hub_download

    return Path(_fetched(lambda: hf_hub_download(repository, file), f"{repository}:{file}"))


def folder_from_hub(repository: str, folder: str, files: Sequence[str]) -> Path:
    """A folder of a repository ("" is all of it), of it the files of these patterns.

    Raises:
        ImpromptError: there is none, or no network.
    """
    from huggingface_hub import snapshot_download

    patterns = [f"{folder}/{pattern}" if folder else pattern for pattern in files]
    name = f"{repository}:{folder}" if folder else repository
    kept = _fetched(lambda: snapshot_download(repository, allow_patterns=patterns), name)
    return Path(kept) / folder


def _fetched(fetch: Callable[[], Any], name: str) -> Any:
    try:
        return fetch()
    except Exception as error:  # of the hub's library, of the network, of the disk
        raise ImpromptError(
            f"{name!r} is neither here nor to be had from the model hub ({first_line(error)})."
        ) from error
