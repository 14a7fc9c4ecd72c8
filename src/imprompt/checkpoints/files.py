"""Adapters on disk: load, save, and say what a file is."""

import errno
import os
import pickle
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imprompt.adapters import Feature, ImagePromptAdapter, family_of
from imprompt.adapters.projection import FacePlusProjection, FullProjection
from imprompt.checkpoints.detection import build, listed
from imprompt.checkpoints.layouts import NATIVE_FORMAT, Checkpoint, to_official
from imprompt.core.errors import ImpromptError

FORMAT_VERSION = "1"
# The second generation of face-id-plus has the same keys as the first and is known by its name.
SHORTCUT_NAME = "plusv2"


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What a checkpoint file holds."""

    path: Path
    layout: str
    """native, official, diffusers or training"""
    variant: str
    base_family: str
    """which models it fits, from the width of the text states"""
    cross_attention_dim: int
    num_tokens: int | None
    """per image; None where there are as many as the encoder gives"""
    num_sites: int
    """cross-attention sites"""
    num_parameters: int
    lora_rank: int
    """0 without LoRA"""
    dtype: str
    features: tuple[Feature, ...]
    """what the adapter reads"""
    size_bytes: int
    metadata: dict[str, str]


def load_adapter(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> ImagePromptAdapter:
    """An adapter from a file of any known layout; what it is, is read from its keys and shapes.

    Known are the authors' `.bin` and `.safetensors`, the UNet state of diffusers, the state of
    the authors' training scripts, and our own. Nothing in a file is executed.

    Args:
        dtype: of the weights; None keeps the file's.

    Raises:
        ImpromptError: no such file, unreadable, damaged, or not an adapter.
    """
    path = Path(path)
    checkpoint, adapter = read_adapter(path)
    tensors = {
        key: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for key, tensor in checkpoint.tensors.items()
    }
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ImpromptError(f"{path} is damaged: numbers that are not finite in {listed(broken)}.")
    adapter.load_state_dict(tensors, assign=True)
    return adapter.requires_grad_()


def save_adapter(
    adapter: ImagePromptAdapter,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter as safetensors with exactly the official keys.

    diffusers, ComfyUI and the authors' code load it as it is. The file appears under its name
    when it is complete, or not at all.

    Args:
        path: ends with ".safetensors"; missing folders are made.
        metadata: is stored in the file beside what `adapter.metadata` holds, e.g. {"base": …}.
        dtype: of the file, e.g. torch.float16; None keeps the adapter's.

    Raises:
        ImpromptError: another ending, or the file cannot be written (disk full, no permission).
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ImpromptError(f'{path} does not end with ".safetensors", the only format written.')
    tensors = {
        key: tensor.detach().to("cpu", dtype).contiguous()
        for key, tensor in adapter.state_dict().items()
    }
    facts = {
        "format": NATIVE_FORMAT,
        "format_version": FORMAT_VERSION,
        "variant": adapter.variant,
        "cross_attention_dim": str(adapter.cross_attention_dim),
    }
    if adapter.num_tokens is not None:
        facts["num_tokens"] = str(adapter.num_tokens)
    if isinstance(adapter.image_proj, FacePlusProjection):
        facts["shortcut"] = str(adapter.image_proj.shortcut).lower()
    write_tensors(tensors, path, adapter.metadata | dict(metadata or {}) | facts)


def inspect(path: str | os.PathLike[str]) -> AdapterInfo:
    """What is this file? Variant, base, tokens, parameters.

    Raises:
        ImpromptError: as `load_adapter`.
    """
    path = Path(path)
    checkpoint, adapter = read_adapter(path)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values()})
    return AdapterInfo(
        path=path,
        layout=checkpoint.layout,
        variant=adapter.variant,
        base_family=family_of(adapter.cross_attention_dim),
        cross_attention_dim=adapter.cross_attention_dim,
        num_tokens=adapter.num_tokens,
        num_sites=sum(site.is_cross for site in adapter.site_weights.values()),
        num_parameters=sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        lora_rank=adapter.lora_rank,
        dtype=", ".join(dtypes),
        features=adapter.projection.features,
        size_bytes=path.stat().st_size,
        metadata=checkpoint.metadata,
    )


def read_adapter(path: Path) -> tuple[Checkpoint, ImagePromptAdapter]:
    """A file's tensors under official keys, and the adapter they belong to (still without them)."""
    content, metadata = read_tensors(path)
    try:
        checkpoint = to_official(content, metadata)
        adapter = build(checkpoint.tensors)
    except ImpromptError as error:
        raise ImpromptError(f"{path} is {error}") from None
    adapter.metadata = dict(checkpoint.metadata)
    projection = adapter.image_proj
    if isinstance(projection, FacePlusProjection):
        projection.shortcut = (
            metadata["shortcut"] == "true"
            if "shortcut" in metadata
            else SHORTCUT_NAME in path.name.lower().replace("-", "").replace("_", "")
        )
    if isinstance(projection, FullProjection) and metadata.get("num_tokens", "").isdigit():
        projection.num_tokens = int(metadata["num_tokens"])
    return checkpoint, adapter


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Content and metadata of a safetensors file or of a pickled one, told apart by content."""
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
        raise ImpromptError(f"{path} is a folder; give a file of it ({listed(files)}).")
    if not path.is_file():
        raise ImpromptError(f"{path} does not exist.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
            if start.startswith(b"version https://git-lfs"):
                raise ImpromptError(f"{path} is a Git LFS pointer, not the file: `git lfs pull`.")
            # Safetensors is 8 bytes of length, then JSON; what torch saves is a zip or a pickle.
            is_json = start[8:9] == b"{"
            if start.startswith(b"PK") or (start.startswith(b"\x80") and not is_json):
                file.seek(0)  # given a name, torch would judge by its ending
                return dict(torch.load(file, map_location="cpu", weights_only=True)), {}
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except pickle.UnpicklingError:
        raise ImpromptError(
            f"{path} cannot be read as a checkpoint: it is half-written, or pickles more than "
            "tensors, which is not loaded because it could run any code."
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ImpromptError(
            f"{path} cannot be read as a checkpoint (half-written, or another kind of file): "
            f"{reason}"
        ) from None
    except (OSError, TypeError) as error:
        raise ImpromptError(f"{path} cannot be read: {error}") from None


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
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ImpromptError(
            f"{path} was not written ({size_bytes / 1e6:.3g} MB needed): {reason_of(error)}."
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def reason_of(error: Exception) -> str:
    if "No space left" in str(error):
        return "the disk is full; free some space or choose another place"
    return getattr(error, "strerror", None) or str(error)
