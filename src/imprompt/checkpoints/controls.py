"""ControlNets and T2I-Adapters in diffusers' folder layout: what they are and which maps they read."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imprompt.bases.folder import check_complete, has_only_half_precision_files
from imprompt.core.errors import ImpromptError, first_line
from imprompt.core.hub import folder_from_hub, place_on_hub
from imprompt.core.shipped import CONTROLS, WEIGHTS, folder_named

DESCRIPTION = "control.json"
"""Beside a network that was trained here: which maps it reads, and the base it was trained on."""
CLASSES = ("ControlNetModel", "T2IAdapter")
FILES_ON_HUB = ("*.json", "*.safetensors")
OLDER_FILES_ON_HUB = ("*.bin",)  # where there are no others


@dataclass(frozen=True)
class LoadedControl:
    """A network that obeys a map: diffusers' `ControlNetModel` or `T2IAdapter`.

    `kind` is that of the maps it reads, empty if the folder does not say.
    """

    module: Any
    kind: str = ""


def load_control(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoadedControl:
    """A ControlNet or a T2I-Adapter from a folder, frozen.

    "diorama-segmentation" and "diorama-depth" are those that come with the embedded base; "owner/name" or
    "owner/name:folder" is one on the hub.

    Raises:
        ImpromptError: it is neither, or damaged.
    """
    name, folder = folder, folder_named(folder, CONTROLS, FILES_ON_HUB)
    if folder.is_file():
        raise ImpromptError(
            f"{folder} is a file, and a control is a folder as diffusers writes it: "
            f'diffusers.ControlNetModel.from_single_file("{folder}").save_pretrained(FOLDER) makes one of a '
            "ControlNet, and of a T2I-Adapter diffusers' script convert_original_t2i_adapter.py."
        )
    if (place := place_on_hub(name)) and not any(folder.glob("*.safetensors")):
        folder_from_hub(*place, OLDER_FILES_ON_HUB)
    config = _json(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in CLASSES:
        raise ImpromptError(
            f"{folder} holds {kind or 'no model of diffusers'}; a control is one of {', '.join(CLASSES)}."
        )
    import diffusers

    try:
        module, info = getattr(diffusers, kind).from_pretrained(
            str(folder),
            torch_dtype=dtype,
            local_files_only=True,
            variant="fp16" if has_only_half_precision_files(folder) else None,
            output_loading_info=True,
        )
    except Exception as error:
        raise ImpromptError(
            f"The {kind} in {folder} cannot be read: {first_line(error)}."
        ) from error
    check_complete(info, f"The {kind} in {folder}")
    described = _json(folder / DESCRIPTION) if (folder / DESCRIPTION).is_file() else {}
    return LoadedControl(
        module.to(device).eval().requires_grad_(False),
        str(described.get("kind", "")),
    )


def save_network(network: Any, folder: Path) -> None:
    """Write a diffusers network as its own class loads it, in half precision; it stays as it is.

    A network that was read from a folder remembers which; what is written does not tell.
    """
    copied = deepcopy(network).half().to(memory_format=torch.contiguous_format)
    copied.register_to_config(_name_or_path="")
    copied.save_pretrained(folder)


def shipped_controls() -> dict[str, Path]:
    """The controls that come with the package for the diorama base: folders by kind of map."""
    folders = sorted(path.parent for path in WEIGHTS.glob(f"diorama-*/{DESCRIPTION}"))
    return {str(_json(folder / DESCRIPTION)["kind"]): folder for folder in folders}


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ImpromptError(f"{file.parent} is no control: {file.name} cannot be read.") from error
    if not isinstance(found, dict):
        raise ImpromptError(f"{file} is damaged: it holds no JSON object.")
    return found
