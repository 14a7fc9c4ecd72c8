"""Frozen text-to-image models behind one interface."""

from imprompt.bases.clip_vision import ClipImageEncoder
from imprompt.bases.loading import load_base
from imprompt.bases.placement import offload
from imprompt.bases.protocol import Base, image_encoder_of
from imprompt.bases.residuals import Residuals
from imprompt.bases.text import TextStates

__all__ = [
    "Base",
    "ClipImageEncoder",
    "Residuals",
    "TextStates",
    "image_encoder_of",
    "load_base",
    "offload",
]
