"""Folders that hold something else than an adapter, told apart so that a message can say what they are for."""

import json
from pathlib import Path

from imprompt.checkpoints.controls import CLASSES, DESCRIPTION
from imprompt.checkpoints.messages import one_line
from imprompt.core.errors import ImpromptError

NAMES: dict[str, str] = dict(zip(CLASSES, ("ControlNet", "T2I-Adapter"), strict=True))
# What `imprompt train` leaves in the folder of a run.
EXPORTS = ("adapter.safetensors", "control", "identity")


def check_is_no_other_folder(folder: Path) -> None:
    """Raise an ImpromptError that says what a folder is, if it is a control, an identity or a run."""
    name = NAMES.get(_value(folder / "config.json", "_class_name"))
    if name is not None:
        kind = _value(folder / DESCRIPTION, "kind")
        raise ImpromptError(
            f"{folder} is a {name}{f' for {kind} maps' if kind else ''}, no image-prompt adapter: use it "
            f"with --control {kind or 'KIND'}=MAP --control-model {kind or 'KIND'}={folder}."
        )
    if (folder / "ControlNetModel").is_dir():
        raise ImpromptError(
            f"{folder} is an identity, an adapter beside its IdentityNet: use it with --identity PICTURE "
            f"--identity-model {folder}, or give a file of it."
        )
    for export in EXPORTS:
        if (folder / export).exists():
            raise ImpromptError(f"{folder} is a folder; what it holds is {folder / export}.")


def _value(file: Path, name: str) -> str:
    """A text of a JSON file, printable; empty if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    value = content.get(name) if isinstance(content, dict) else None
    return one_line(value) if isinstance(value, str) else ""
