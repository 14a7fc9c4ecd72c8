"""Safetensors files, written whole or not at all."""

# Strict but for what safetensors leaves untyped:
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from imprompt.core.errors import ImpromptError
from imprompt.core.files import is_disk_full, replacing


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
        with replacing(path, temporary):
            # safetensors writes files that nobody but their owner may read; others shall, as of any new file.
            temporary.touch()
            permissions = temporary.stat().st_mode
            save_file(dict(tensors), temporary, metadata=dict(metadata))
            temporary.chmod(permissions)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if is_disk_full(error):
            reason = "the disk is full; free some space or choose another place"
        raise ImpromptError(
            f"{path} was not written ({size_bytes / 1e6:.3g} MB needed): {reason}."
        ) from None
