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
from imprompt.core.hub import is_on_hub

__all__ = ["ClipImageEncoder", "load_clip"]


def load_clip(
    name_or_path: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    subfolder: str = "",
) -> ClipImageEncoder:
    """An image encoder from a folder (read without network access) or a hub's "owner/name".

    The folder is that of a transformers `CLIPVisionModelWithProjection`: config.json and weights as
    safetensors. Of a folder or repository that holds several models, `subfolder` names one, or the
    name itself does after a colon: "h94/IP-Adapter:models/image_encoder" (SDXL's:
    "h94/IP-Adapter:sdxl_models/image_encoder").

    Raises:
        ImpromptError: there is none, or it is damaged.
    """
    place, colon, inside = str(name_or_path).rpartition(":")
    if colon and inside and not subfolder and not Path(name_or_path).exists():
        name, subfolder = place, inside
    else:
        name = str(name_or_path)
    is_local = bool(name) and Path(name).is_dir()
    # A `Path` is meant to be here.
    if not is_local and not (isinstance(name_or_path, str) and is_on_hub(name)):
        raise ImpromptError(
            f"There is no image encoder {str(name_or_path)!r}: no such folder. Give a folder with "
            'config.json and model.safetensors, or a model on the hub as "owner/name" or '
            '"owner/name:folder".'
        )
    source = Path(name) if is_local else name
    return load_image_encoder(source, str(name_or_path), dtype, subfolder).to(device)
