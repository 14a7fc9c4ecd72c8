"""From a file to named tensors, without trusting the file.

Nothing in a file is executed, and nothing it merely declares is allocated: no compressed archives,
no tensors larger than the bytes behind them. Whatever goes wrong is an ImpromptError of one line.
"""

import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from imprompt.checkpoints.messages import listed, one_line
from imprompt.core.errors import ImpromptError, first_line

# What accelerate, DeepSpeed and diffusers call the weights in a folder. First the one that keeps
# all names: where tensors are shared, safetensors drops all of their names but one.
STATE_FILES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model/mp_rank_00_model_states.pt",
    "diffusion_pytorch_model.safetensors",
)
DTYPES = {  # as safetensors calls them; an adapter in another is refused
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
MAX_INDEX_BYTES = 64 << 20


class Content(NamedTuple):
    """What lies in a file, under the file's own names."""

    values: dict[str, Any]
    metadata: dict[str, str]
    size_bytes: int


def read_content(path: Path, *, with_values: bool = True) -> Content:
    """Content of a safetensors file, of a pickled one (told apart by content), or of the folder
    that a training script saved.

    Args:
        with_values: else tensors may be on the meta device: it is enough to know what a file is,
            and of safetensors only the header is read.

    Raises:
        ImpromptError: no such file, unreadable, or another kind of file.
    """
    if path.is_dir():
        found = [path / name for name in STATE_FILES if (path / name).is_file()]
        if not found:
            names = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
            raise ImpromptError(f"{path} is a folder; give a file of it ({listed(names)}).")
        path = found[0]
    if not path.is_file():
        raise ImpromptError(f"{path} does not exist.")
    try:
        if path.name.endswith(".index.json"):
            return read_shards(path, with_values=with_values)
        return read_file(path, with_values=with_values)
    except ImpromptError:
        raise
    except pickle.UnpicklingError:
        raise ImpromptError(
            f"{path} cannot be read as a checkpoint: it is half-written, or pickles more than "
            "tensors, which is not loaded because it could run any code."
        ) from None
    except OSError as error:
        raise ImpromptError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a reader that is fed noise may stumble over anything
        reason = one_line(first_line(error), 160)
        if "allocate memory" in reason or isinstance(error, MemoryError):
            reason = "it declares more than fits into the memory"
        raise ImpromptError(
            f"{path} cannot be read as a checkpoint (half-written, or another kind of file): "
            f"{reason}"
        ) from None


def read_file(path: Path, *, with_values: bool) -> Content:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise ImpromptError(f"{path} is a Git LFS pointer, not the file: `git lfs pull`.")
        # Safetensors is 8 bytes of length, then JSON; what torch saves is a zip or a pickle.
        is_json = start[8:9] == b"{"
        is_zip = start.startswith(b"PK")
        if is_zip or (start.startswith(b"\x80") and not is_json):
            if is_zip:
                check_archive(path, file, size_bytes)
            file.seek(0)  # given a name, torch would judge by its ending
            with warnings.catch_warnings():  # of torch, about how others once wrote their files
                warnings.simplefilter("ignore")
                values = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(values, Mapping):
                raise ImpromptError(
                    f"{path} is no checkpoint of an adapter: it holds {type(values).__name__}, "
                    "and not tensors by name."
                )
            check_memory(path, values, size_bytes)
            return Content(dict(values), {}, size_bytes)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        values = {
            key: file.get_tensor(key) if with_values else without_value(file.get_slice(key))
            for key in file.keys()  # noqa: SIM118
        }
        return Content(values, metadata, size_bytes)


def without_value(declared: Any) -> Tensor:
    """A tensor of the shape and type that a header declares, on the meta device."""
    dtype = DTYPES.get(declared.get_dtype(), torch.uint8)
    return torch.empty(declared.get_shape(), dtype=dtype, device="meta")


def check_archive(path: Path, file: IO[bytes], size_bytes: int) -> None:
    """Refuse an archive that would take more memory than it has bytes.

    torch writes its entries uncompressed, so a compressed one, or entries that share bytes, were
    made to fill the memory of whoever opens them.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        raise ImpromptError(
            f"{path} cannot be read as a checkpoint: it is half-written, or another kind of file."
        ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ImpromptError(
            f"{path} is a compressed archive, which no checkpoint is: it is not unpacked."
        )
    declared_bytes = sum(entry.file_size for entry in entries)
    if declared_bytes > size_bytes:
        raise ImpromptError(
            f"{path} declares {declared_bytes:,} bytes of content but has {size_bytes:,}: "
            "it is not unpacked."
        )
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise ImpromptError(f"{path} is damaged: an archive with the same entry twice.")


def check_memory(path: Path, values: Mapping[Any, Any], size_bytes: int) -> None:
    """Refuse tensors that have a size but not the memory: views that repeat a few numbers, kinds
    without plain memory (sparse, quantised, meta), and more memory than the file has bytes."""
    storages: dict[int, int] = {}
    for key, tensor in tensors_in(values):
        is_plain = (
            tensor.layout is torch.strided
            and not tensor.is_quantized
            and tensor.device.type == "cpu"
        )
        if is_plain:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        if not is_plain or tensor.numel() * tensor.element_size() > storage.nbytes():
            raise ImpromptError(
                f"{path} is damaged: {one_line(key)} is no plain tensor, its size "
                f"{one_line(str(tuple(tensor.shape)))} is only declared."
            )
    if sum(storages.values()) > size_bytes:
        raise ImpromptError(
            f"{path} is damaged: {sum(storages.values()):,} bytes of tensors in a file of "
            f"{size_bytes:,}."
        )


def tensors_in(values: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, with its key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from tensors_in(value)
        elif isinstance(value, Tensor):
            yield str(key), value


def read_shards(index: Path, *, with_values: bool) -> Content:
    """The files that an index names, as one."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise ImpromptError(f"{index} is too large for an index of files.")
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ImpromptError(f"{index} is no index of files: it lacks weight_map.") from None
    shards: list[Content] = []
    for name in sorted(map(str, names)):
        file = index.parent / name
        # An index names its neighbours; anything else would read elsewhere on this machine.
        if Path(name).name != name or not file.is_file():
            raise ImpromptError(f"{index} names {one_line(name)}, which is not beside it.")
        shards.append(read_file(file, with_values=with_values))
    return Content(
        {key: value for shard in shards for key, value in shard.values.items()},
        shards[0].metadata if shards else {},
        sum(shard.size_bytes for shard in shards),
    )
