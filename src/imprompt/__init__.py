"""Imprompt: image prompts for text-to-image diffusion models.

base    = imprompt.load_base("diorama")
adapter = imprompt.load_adapter("diorama")  # or a file
images  = imprompt.generate(base, image_prompts=imprompt.ImagePrompt("photo.png", adapter=adapter))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imprompt.adapters import ImagePromptAdapter, create_adapter
    from imprompt.bases import load_base
    from imprompt.checkpoints import load_adapter, load_control, load_identity, save_adapter
    from imprompt.core.errors import ImpromptError
    from imprompt.diffusion.samplers import Sampler
    from imprompt.encoders import load_clip
    from imprompt.generation import (
        Control,
        Explanation,
        IdentityPrompt,
        ImagePrompt,
        InitImage,
        encode_images,
        generate,
    )

__version__ = "0.1.0"
__all__ = [
    "Control",
    "Explanation",
    "IdentityPrompt",
    "ImagePrompt",
    "ImagePromptAdapter",
    "ImpromptError",
    "InitImage",
    "Sampler",
    "create_adapter",
    "encode_images",
    "generate",
    "load_adapter",
    "load_base",
    "load_clip",
    "load_control",
    "load_identity",
    "save_adapter",
]

_HOMES = {
    "Control": "imprompt.generation",
    "Explanation": "imprompt.generation",
    "IdentityPrompt": "imprompt.generation",
    "ImagePrompt": "imprompt.generation",
    "ImagePromptAdapter": "imprompt.adapters",
    "ImpromptError": "imprompt.core.errors",
    "InitImage": "imprompt.generation",
    "Sampler": "imprompt.diffusion.samplers",
    "create_adapter": "imprompt.adapters",
    "encode_images": "imprompt.generation",
    "generate": "imprompt.generation",
    "load_adapter": "imprompt.checkpoints",
    "load_base": "imprompt.bases",
    "load_clip": "imprompt.encoders",
    "load_control": "imprompt.checkpoints",
    "load_identity": "imprompt.checkpoints",
    "save_adapter": "imprompt.checkpoints",
}


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    # Imported when first used, so that the command line answers at once.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'imprompt' has no attribute {name!r}")
