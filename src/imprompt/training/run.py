"""From a system's name, a preset and settings to a finished run: what `imprompt train` does."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from imprompt.bases import Base, load_base
from imprompt.core.config import build, read_toml, to_toml, with_settings
from imprompt.core.errors import ImpromptError
from imprompt.data.columns import FRAMING
from imprompt.data.dataset import Columns
from imprompt.data.joined import JoinedColumns
from imprompt.data.on_the_fly import PairsOnTheFly
from imprompt.data.records import Reading
from imprompt.data.rows import FirstRows, Rows
from imprompt.data.store import disk_errors
from imprompt.encoders.clip import load_named_clip
from imprompt.systems.denoising import framing_columns
from imprompt.systems.protocol import System
from imprompt.training.card import write_card
from imprompt.training.config import PRECISIONS, TrainConfig
from imprompt.training.loop import Interrupted, train
from imprompt.training.output import say
from imprompt.training.parallel import trained_parameters
from imprompt.training.processes import join_processes, leave_processes

# Each module has `build(options, base, columns)`; the class of its options stands beside it.
SYSTEMS: dict[str, tuple[str, str]] = {
    "image-prompt": ("imprompt.systems.image_prompt", "ImagePromptOptions"),
    "instruct": ("imprompt.systems.instruct", "InstructOptions"),
    "instruct-words": ("imprompt.systems.instruct_words", "InstructWordsOptions"),
    "concatenation": ("imprompt.systems.concatenation", "ConcatenationOptions"),
    "controlnet": ("imprompt.systems.controlnet", "ControlNetOptions"),
    "t2i-adapter": ("imprompt.systems.t2i_adapter", "T2IAdapterOptions"),
    "map-reader": ("imprompt.systems.map_reader", "MapReaderOptions"),
    "text-to-image": ("imprompt.systems.text_to_image", "TextToImageOptions"),
    "autoencoder": ("imprompt.systems.autoencoder", "AutoencoderOptions"),
    "contrastive": ("imprompt.systems.contrastive", "ContrastiveOptions"),
    "classifier": ("imprompt.systems.classifier", "ClassifierOptions"),
    "face-encoder": ("imprompt.systems.face_encoder", "FaceEncoderOptions"),
    "face-id": ("imprompt.systems.face_id", "FaceIdOptions"),
    "identity": ("imprompt.systems.identity", "IdentityOptions"),
}
# What decides which model reads the faces in photos, where a system reads faces.
FACE_VARIANTS = {"face-id": "faceid", "identity": "identity"}
_FACES_ARE_READ = "{} is prepared: its faces are read already. Leave --face-encoder out."
PRESETS = Path(__file__).parent.parent / "presets"
EXPORT_NAMES = {
    "image-prompt": "adapter.safetensors",
    "instruct": "adapter.safetensors",
    "instruct-words": "adapter.safetensors",
    "concatenation": "tokens.safetensors",
    "classifier": "judge.safetensors",
    "map-reader": "map-reader.safetensors",
    "controlnet": "control",
    "t2i-adapter": "control",
    "face-encoder": "face-encoder.safetensors",
    "face-id": "adapter.safetensors",
    "identity": "identity",
}


def preset_path(name: str) -> Path:
    """A preset by name (those that come with the package) or by file.

    Raises:
        ImpromptError: there is none; the message lists what there is.
    """
    own = PRESETS / f"{name}.toml"
    if own.is_file():
        return own
    if Path(name).is_file():
        return Path(name)
    known = ", ".join(sorted(path.stem for path in PRESETS.glob("*.toml")))
    raise ImpromptError(f"There is no preset {name!r}; give a TOML file or one of: {known}.")


def prepare_run(
    system_name: str, base: Base, columns: Rows, preset: str | None, settings: list[str]
) -> tuple[System, TrainConfig, dict[str, Any]]:
    """The system to train, how to train it, and the resolved settings of both.

    Raises:
        ImpromptError: no such system or preset, or a setting that does not exist.
    """
    if system_name not in SYSTEMS:
        raise ImpromptError(
            f"There is no system {system_name!r}; choose one of: {', '.join(SYSTEMS)}."
        )
    module_name, options_name = SYSTEMS[system_name]
    module = importlib.import_module(module_name)
    tables = read_toml(preset_path(preset)) if preset else {}
    tables = with_settings(tables, settings)
    unknown = set(tables) - {"train", "system"}
    if unknown:
        raise ImpromptError(
            f"There is no group of settings {sorted(unknown)[0]!r}; settings begin with train. or system."
        )
    config = build(TrainConfig, tables.get("train", {}), "train.")
    options = build(getattr(module, options_name), tables.get("system", {}), "system.")
    resolved = {"system": dataclasses.asdict(options), "train": dataclasses.asdict(config)}
    if config.frozen_precision != "float32":
        base.to(base.device, PRECISIONS[config.frozen_precision])
    if isinstance(columns, PairsOnTheFly):
        columns.hold_out(config.validation_rows)
    # What a system begins with must not know the rows it is validated on.
    num_rows = max(1, len(columns) - config.validation_rows)
    system: System = module.build(options, base, FirstRows(columns, num_rows))
    system.columns = (*system.columns, *framing_columns(system.columns, base, columns))
    for _, parameter in trained_parameters(system.module):
        parameter.data = parameter.data.float()  # what learns is kept in full precision
    return system, config, resolved


def open_data(
    data: Path | str | Sequence[Path | str],
    base: Base,
    size_px: int | None = None,
    reading: Reading | None = None,
    *,
    variant: str = "base",
    face_encoder: str | None = None,
) -> Rows:
    """What `imprompt prepare` made, or a source that it would read, to be encoded on the fly.

    Several are joined; all of them must be prepared.

    Raises:
        ImpromptError: it is neither, or it is prepared and a face encoder is given; of several, one is
            not prepared, or they do not fit together.
    """
    if not isinstance(data, Path | str):
        if len(data) > 1:
            if face_encoder is not None:
                raise ImpromptError(_FACES_ARE_READ.format(" ".join(map(str, data))))
            return JoinedColumns([Columns.open(part) for part in data])
        (data,) = data
    name = str(data)
    is_prepared = any((Path(name) / file).exists() for file in ("meta.json", "begun.json"))
    if is_prepared or "://" in name or (":" not in name and not Path(name).exists()):
        if face_encoder is not None:
            raise ImpromptError(_FACES_ARE_READ.format(name))
        return Columns.open(data)
    try:
        return PairsOnTheFly(
            name,
            base,
            size_px=size_px,
            reading=reading,
            variant=variant,
            face_encoder=face_encoder,
        )
    except ImpromptError as error:
        raise ImpromptError(f"{name} is no prepared data, and no source either: {error}") from error


def run_training(
    system_name: str,
    *,
    data: Path | str | Sequence[Path | str],
    base: str | Base,
    image_encoder: str | None = None,
    output: Path,
    preset: str | None = None,
    settings: list[str] | None = None,
    engine: str = "auto",
    num_processes: int | None = None,
    device: torch.device | str | None = None,
    size_px: int | None = None,
    reading: Reading | None = None,
    face_encoder: str | None = None,
    set_up_previews: Callable[[System, Base, Rows, int], None] | None = None,
) -> Path:
    """Train a system; the same call goes on where the last one stopped.

    A base that is given as an object is moved to where the run computes.
    `data` are prepared, in one folder or several, or a source of pairs, which is read as `reading` says
    and encoded at `size_px` (by default the base's) whenever a step needs it; `face_encoder` reads its
    faces, as in `prepare`.
    `engine` is single, ddp, zero2 or fsdp2; `auto` is ddp where torchrun started several processes.
    `num_processes` is how many there must be, and `device` where one process alone computes (by default a
    GPU, where there is one). `image_encoder`, as NAME or NAME:SUBFOLDER, is given to
    a base that brings none: the one that the data were prepared with. `set_up_previews` may let the
    system draw.

    Returns:
        The exported file or folder.

    Raises:
        ImpromptError: whatever of this does not fit together.
        Interrupted: stopped by a signal, after saving.
    """
    processes = join_processes(engine, num_processes, device)
    if isinstance(base, str):
        loaded = load_base(base, device=processes.device)
    else:
        loaded = base
        if loaded.device != processes.device:
            loaded.to(processes.device)
    if image_encoder is not None:
        loaded.image_encoder = load_named_clip(image_encoder, loaded.dtype, loaded.device)
    fingerprint = loaded.fingerprint()  # before an engine cuts its weights into slices
    columns = open_data(
        data,
        loaded,
        size_px,
        reading,
        variant=FACE_VARIANTS.get(system_name, "base"),
        face_encoder=face_encoder,
    )
    system, config, resolved = prepare_run(system_name, loaded, columns, preset, settings or [])
    if set_up_previews is not None:
        # The last rows are drawn, and of these no more than are held out.
        num_images = min(config.preview_images, config.validation_rows)
        set_up_previews(system, loaded, columns, num_images)
    identity: dict[str, Any] = {"system": {"name": system_name, **resolved["system"]}}
    if FRAMING in system.columns:  # may have been added to data that a run was begun on without
        identity[FRAMING] = True
    try:
        export = train(
            system,
            columns,
            config,
            output,
            identity=identity,
            export_name=EXPORT_NAMES.get(system_name, "export"),
            processes=processes,
        )
    except Interrupted:  # all of them stop at the same step
        leave_processes(processes)
        raise
    finally:
        if isinstance(columns, PairsOnTheFly) and columns.unusable:
            process = f"-{processes.rank}" if processes.rank else ""
            columns.write_unusable(output / f"quarantine{process}.jsonl")
            say(
                f"{len(columns.unusable)} pairs could not be used; {output}/quarantine.jsonl says why"
            )
    if processes.is_main:
        with disk_errors(output):
            (output / "config.toml").write_text(to_toml(resolved), encoding="utf-8")
        write_card(
            output,
            export,
            system=system_name,
            base=loaded.name,
            base_fingerprint=fingerprint,
            data=columns.meta,
            settings=resolved,
            preset=preset,
        )
    leave_processes(processes)
    return export
