"""Frozen text-to-image models behind one interface."""

from imprompt.bases.clip_vision import ClipImageEncoder
from imprompt.bases.loading import load_base
from imprompt.bases.protocol import Base

__all__ = ["Base", "ClipImageEncoder", "load_base"]
