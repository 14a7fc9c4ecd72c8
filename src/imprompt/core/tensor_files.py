"""Safetensors files, written whole or not at all."""

# Strict but for what safetensors leaves untyped:
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from imprompt.core.errors import ImpromptError


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write safetensors beside the target, then rename: a reader sees a whole file or none.

    Raises:
        ImpromptError: disk full, no permission, or another reason why it cannot be written.
    """
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(path.parent).free
        if free_bytes < size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # safetensors writes files that nobody but their owner may read; others shall, as of any new file.
        temporary.touch()
        permissions = temporary.stat().st_mode
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        temporary.chmod(permissions)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ImpromptError(
            f"{path} was not written ({size_bytes / 1e6:.3g} MB needed): {_reason_of(error)}."
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _reason_of(error: Exception) -> str:
    if "No space left" in str(error):
        return "the disk is full; free some space or choose another place"
    return getattr(error, "strerror", None) or str(error)
