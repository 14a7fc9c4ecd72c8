"""CLIP as an image encoder: the one a base brings along, or another from a folder or the hub.

Adapters for Stable Diffusion were trained on OpenCLIP ViT-H/14 (SDXL's: also ViT-bigG/14), which
are not part of those bases and are loaded on their own.
"""

from os import PathLike
from pathlib import Path

import torch

from imprompt.bases.clip_vision import ClipImageEncoder
from imprompt.bases.folder import load_image_encoder
from imprompt.core.errors import ImpromptError

__all__ = ["ClipImageEncoder", "load_clip", "load_named_clip"]


def load_clip(
    name_or_path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    subfolder: str = "",
) -> ClipImageEncoder:
    """An image encoder from a folder (read without network access) or a hub's "owner/name".

    The folder is that of a transformers `CLIPVisionModelWithProjection`: config.json and weights as
    safetensors. Of a repository that holds several models, `subfolder` names one (in
    "h94/IP-Adapter": "models/image_encoder" and "sdxl_models/image_encoder").

    Raises:
        ImpromptError: there is none, or it is damaged.
    """
    path = Path(name_or_path)
    local = path.is_dir()
    if not local and (not isinstance(name_or_path, str) or name_or_path.count("/") != 1):
        raise ImpromptError(
            f"There is no image encoder {str(name_or_path)!r}: no such folder. Give a folder with "
            'config.json and model.safetensors, or the id "owner/name" of a model on the hub.'
        )
    source = path if local else str(name_or_path)
    return load_image_encoder(source, str(name_or_path), dtype, subfolder).to(device)


def load_named_clip(
    name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ClipImageEncoder:
    """As `load_clip`, named in one word: NAME, or NAME:SUBFOLDER of what holds several models.

    Raises:
        ImpromptError: there is none, or it is damaged.
    """
    place, colon, subfolder = name.rpartition(":")
    if colon and place and not Path(name).exists():
        return load_clip(place, dtype, device, subfolder=subfolder)
    return load_clip(name, dtype, device)
