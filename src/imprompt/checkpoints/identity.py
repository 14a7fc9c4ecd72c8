"""InstantID on disk: an adapter's file beside IdentityNet in diffusers' layout.

FOLDER/ip-adapter.safetensors        (as published: ip-adapter.bin)
FOLDER/ControlNetModel/config.json, diffusion_pytorch_model.safetensors
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from imprompt.adapters import ImagePromptAdapter
from imprompt.checkpoints import controls
from imprompt.checkpoints.controls import load_control
from imprompt.checkpoints.files import (
    IDENTITY_DIM,
    READS_FACES,
    READS_RAW_FACES,
    load_adapter,
)
from imprompt.core.errors import ImpromptError
from imprompt.core.shipped import IDENTITIES, folder_named

ADAPTER_FILE = "ip-adapter.safetensors"
PUBLISHED_ADAPTER_FILE = "ip-adapter.bin"
CONTROLNET_FOLDER = "ControlNetModel"
PUBLISHED_WEIGHT = 0.8  # of the authors' examples; with more, colours run over and the text is lost
FILES_ON_HUB = (
    ADAPTER_FILE,
    PUBLISHED_ADAPTER_FILE,
    *(f"{CONTROLNET_FOLDER}/{pattern}" for pattern in controls.FILES_ON_HUB),
)


@dataclass(frozen=True, eq=False)
class Identity:
    """What keeps a person: an adapter that reads identity vectors, and IdentityNet."""

    adapter: ImagePromptAdapter
    net: Any
    """A diffusers `ControlNetModel`."""

    @property
    def weight(self) -> float:
        """How strongly it is used best: as published at 0.8, what is trained here (and says by whom faces were
        read) at 1."""
        return 1.0 if self.adapter.metadata.get("face_encoder") else PUBLISHED_WEIGHT


def load_identity(
    folder: str | PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Identity:
    """InstantID from a folder as its authors published it, or as `imprompt train identity` writes it.

    "diorama" is the one that comes with the embedded base; "InstantX/InstantID" is the published one on the hub.

    Raises:
        ImpromptError: a part is missing or damaged.
    """
    folder = folder_named(folder, IDENTITIES, FILES_ON_HUB)
    files = [folder / name for name in (ADAPTER_FILE, PUBLISHED_ADAPTER_FILE)]
    adapter_file = next((file for file in files if file.is_file()), None)
    if adapter_file is None:
        raise ImpromptError(
            f"{folder} holds no identity adapter: {ADAPTER_FILE} or {PUBLISHED_ADAPTER_FILE} is "
            f"needed, and {CONTROLNET_FOLDER}/ beside it. `imprompt train identity` writes such a "
            "folder."
        )
    adapter = load_adapter(adapter_file, dtype=dtype, device=device)
    if adapter.variant == "plus" and adapter.projection.features[0].dim == IDENTITY_DIM:
        adapter.metadata.setdefault("reads", READS_RAW_FACES)
    if not reads_faces(adapter):
        raise ImpromptError(f"{adapter_file} is a {adapter.variant} adapter and reads no faces.")
    return Identity(adapter, load_identity_net(folder / CONTROLNET_FOLDER, dtype, device))


def load_identity_net(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Any:
    """IdentityNet, a diffusers `ControlNetModel`, from its folder.

    Raises:
        ImpromptError: there is none, or it is damaged.
    """
    if not (folder / "config.json").is_file():
        raise ImpromptError(f"{folder} holds no IdentityNet (its config.json is missing).")
    net = load_control(folder, dtype=dtype, device=device).module
    if type(net).__name__ != "ControlNetModel":
        raise ImpromptError(f"{folder} holds a {type(net).__name__}; IdentityNet is a ControlNet.")
    return net


def reads_faces(adapter: ImagePromptAdapter) -> bool:
    """Whether an adapter reads identity vectors: face-id ones do, and InstantID's.

    InstantID's has the shapes of a Plus adapter; its metadata, or how it was read, tells.
    """
    names = [feature.name for feature in adapter.projection.features]
    return "id_embeds" in names or adapter.metadata.get("reads") in (READS_FACES, READS_RAW_FACES)
