"""From a system's name, a preset and settings to a finished run: what `imprompt train` does."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

from imprompt.bases import Base, load_base
from imprompt.core.config import build, read_toml, to_toml, with_settings
from imprompt.core.errors import ImpromptError
from imprompt.data.dataset import Columns
from imprompt.data.rows import Rows
from imprompt.systems.protocol import System
from imprompt.training.config import PRECISIONS, TrainConfig
from imprompt.training.loop import train
from imprompt.training.parallel import trained_parameters
from imprompt.training.processes import join_processes, leave_processes

# Each module has `build(options, base, columns)`; the class of its options stands beside it.
SYSTEMS: dict[str, tuple[str, str]] = {
    "image-prompt": ("imprompt.systems.image_prompt", "ImagePromptOptions"),
    "instruct": ("imprompt.systems.instruct", "InstructOptions"),
    "instruct-words": ("imprompt.systems.instruct_words", "InstructOptions"),
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
    system = module.build(options, base, columns)
    for _, parameter in trained_parameters(system.module):
        parameter.data = parameter.data.float()  # what learns is kept in full precision
    return system, config, resolved


def run_training(
    system_name: str,
    *,
    data: Path,
    base: str | Base,
    output: Path,
    preset: str | None = None,
    settings: list[str] | None = None,
    engine: str = "auto",
    num_processes: int | None = None,
) -> Path:
    """Train a system on prepared data; the same call goes on where the last one stopped.

    `engine` is single, ddp, zero2 or fsdp2; `auto` is ddp where torchrun started several processes.
    `num_processes` is how many there must be.

    Returns:
        The exported file or folder.

    Raises:
        ImpromptError: whatever of this does not fit together.
        Interrupted: stopped by a signal, after saving.
    """
    processes = join_processes(engine, num_processes)
    columns = Columns.open(data)
    loaded = load_base(base, device=processes.device) if isinstance(base, str) else base
    system, config, resolved = prepare_run(system_name, loaded, columns, preset, settings or [])
    export = train(
        system,
        columns,
        config,
        output,
        identity={"system": {"name": system_name, **resolved["system"]}},
        export_name=EXPORT_NAMES.get(system_name, "export"),
        processes=processes,
    )
    if processes.is_main:
        (output / "config.toml").write_text(to_toml(resolved), encoding="utf-8")
    leave_processes(processes)
    return export
