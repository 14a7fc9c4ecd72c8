"""Frozen networks that turn images into features for adapters."""

from imprompt.encoders.clip import ClipImageEncoder, load_clip

__all__ = ["ClipImageEncoder", "load_clip"]
