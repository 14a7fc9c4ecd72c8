"""From a system's name, a preset and settings to a finished run: what `imprompt train` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from imprompt.bases import Base, load_base
from imprompt.core.config import build, read_toml, to_toml, with_settings
from imprompt.core.errors import ImpromptError
from imprompt.core.files import disk_errors
from imprompt.core.progress import say
from imprompt.core.randomness import own_randomness
from imprompt.data.columns import FRAMING
from imprompt.data.dataset import Columns
from imprompt.data.joined import JoinedColumns
from imprompt.data.on_the_fly import PairsOnTheFly
from imprompt.data.records import Reading
from imprompt.data.rows import FirstRows, Rows
from imprompt.encoders.clip import load_clip
from imprompt.systems.catalogue import trainable
from imprompt.systems.denoising import framing_columns
from imprompt.systems.protocol import System
from imprompt.training.batches import num_trained_rows
from imprompt.training.card import write_card
from imprompt.training.config import PRECISIONS, TrainConfig
from imprompt.training.loop import Interrupted, train
from imprompt.training.parallel import trained_parameters
from imprompt.training.processes import join_processes, leave_processes
from imprompt.training.validation import Preview

_FACES_ARE_READ = "{} is prepared: its faces are read already. Leave --face-encoder out."
PRESETS = Path(__file__).parent.parent / "presets"


def preset_path(name: str, system_name: str) -> Path:
    """A preset by name (those that come with the package) or by file.

    `diorama` is short for the system's own preset on the embedded base: `diorama-controlnet`, ….

    Raises:
        ImpromptError: there is none; the message lists what there is.
    """
    for own in (PRESETS / f"{name}.toml", PRESETS / f"{name}-{system_name}.toml"):
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
    module, options_class = trainable(system_name).load()
    tables = read_toml(preset_path(preset, system_name)) if preset else {}
    tables = with_settings(tables, settings)
    unknown = set(tables) - {"train", "system"}
    if unknown:
        raise ImpromptError(
            f"There is no group of settings {sorted(unknown)[0]!r}; settings begin with train. or system."
        )
    config = build(TrainConfig, tables.get("train", {}), "train.")
    options = build(options_class, tables.get("system", {}), "system.")
    resolved = {"system": dataclasses.asdict(options), "train": dataclasses.asdict(config)}
    if config.frozen_precision != "float32":
        base.to(base.device, PRECISIONS[config.frozen_precision])
    if isinstance(columns, PairsOnTheFly):
        columns.hold_out(config.validation_rows)
    # What a system begins with must not know the rows it is validated on.
    num_rows = num_trained_rows(columns, config)
    with own_randomness(config.seed):
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
        ImpromptError: it is neither, or it is prepared and it is said how to read it; of several, one is
            not prepared, or they do not fit together.
    """
    if not isinstance(data, Path | str):
        if len(data) > 1:
            _check_nothing_is_left_to_read(" ".join(map(str, data)), size_px, reading, face_encoder)
            return JoinedColumns([Columns.open(part) for part in data])
        (data,) = data
    name = str(data)
    is_prepared = any((Path(name) / file).exists() for file in ("meta.json", "begun.json"))
    if is_prepared or "://" in name or (":" not in name and not Path(name).exists()):
        _check_nothing_is_left_to_read(name, size_px, reading, face_encoder)
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


def _check_nothing_is_left_to_read(
    name: str, size_px: int | None, reading: Reading | None, face_encoder: str | None
) -> None:
    """Raise an ImpromptError if something was said of how to read pictures that are prepared."""
    if face_encoder is not None:
        raise ImpromptError(_FACES_ARE_READ.format(name))
    reading = reading or Reading()
    said = {
        "--size-px": size_px,
        "--image-root": reading.image_root,
        "--image-key": reading.image_key,
        "--caption-key": reading.caption_key,
    }
    for option, value in said.items():
        if value is not None:
            raise ImpromptError(
                f"{name} is prepared: its pictures are read already. Leave {option} out."
            )


def run_training(
    system_name: str,
    *,
    data: Path | str | Sequence[Path | str],
    base: str | Base,
    base_options: Mapping[str, Any] | None = None,
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
    preview_of: Callable[[System, Base, Rows, int], Preview | None] | None = None,
) -> Path:
    """Train a system; the same call goes on where the last one stopped.

    A base that is given as an object is moved to where the run computes; of one that is named, `load_base` is
    told `base_options`.
    `data` are prepared, in one folder or several, or a source of pairs, which is read as `reading` says
    and encoded at `size_px` (by default the base's) whenever a step needs it; `face_encoder` reads its
    faces, as in `prepare`.
    `engine` is single, ddp, zero2 or fsdp2; `auto` is ddp where torchrun started several processes.
    `num_processes` is how many there must be, and `device` where one process alone computes (by default a
    GPU, where there is one). `image_encoder`, as NAME or NAME:SUBFOLDER, is given to
    a base that brings none: the one that the data were prepared with. `preview_of` says how
    a system draws what it has learned (`imprompt.evaluation.previews`); without it nothing is drawn.

    Returns:
        The exported file or folder.

    Raises:
        ImpromptError: whatever of this does not fit together.
        Interrupted: stopped by a signal, after saving.
    """
    processes = join_processes(engine, num_processes, device)
    if isinstance(base, str):
        loaded = load_base(base, device=processes.device, **(base_options or {}))
    else:
        loaded = base
        if loaded.device != processes.device:
            loaded.to(processes.device)
    if image_encoder is not None:
        loaded.image_encoder = load_clip(image_encoder, loaded.dtype, loaded.device)
    fingerprint = loaded.fingerprint()  # before an engine cuts its weights into slices
    columns = open_data(
        data,
        loaded,
        size_px,
        reading,
        variant=trainable(system_name).faces or "base",
        face_encoder=face_encoder,
    )
    system, config, resolved = prepare_run(system_name, loaded, columns, preset, settings or [])
    preview: Preview | None = None
    if preview_of is not None:
        # The last rows are drawn, and of these no more than are held out.
        num_images = min(config.preview_images, config.validation_rows)
        preview = preview_of(system, loaded, columns, num_images)
    identity: dict[str, Any] = {
        "system": {"name": system_name, **resolved["system"]},
        "base_fingerprint": fingerprint,
    }
    if FRAMING in system.columns:  # may have been added to data that a run was begun on without
        identity[FRAMING] = True
    try:
        export = train(
            system,
            columns,
            config,
            output,
            identity=identity,
            export_name=trainable(system_name).export,
            processes=processes,
            preview=preview,
        )
    except Interrupted:  # all of them stop at the same step
        leave_processes(processes)
        raise
    finally:
        if isinstance(columns, PairsOnTheFly) and columns.unusable:
            process = f"-{processes.rank}" if processes.rank else ""
            quarantine = output / f"quarantine{process}.jsonl"
            columns.write_unusable(quarantine)
            say(f"{len(columns.unusable)} pairs could not be used; {quarantine} says why")
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
