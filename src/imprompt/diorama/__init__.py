"""The embedded world: small 3-D scenes whose every detail is known."""

from imprompt.diorama.captions import NUM_PHRASINGS, caption, everyday_caption
from imprompt.diorama.rendering import Render, render
from imprompt.diorama.scene import Character, Scene, sample_character, sample_scene
from imprompt.diorama.vocabulary import COLOURS, KINDS, OBJECT_KINDS, SETTINGS, STYLES

__all__ = [
    "COLOURS",
    "KINDS",
    "NUM_PHRASINGS",
    "OBJECT_KINDS",
    "SETTINGS",
    "STYLES",
    "Character",
    "Render",
    "Scene",
    "caption",
    "everyday_caption",
    "render",
    "sample_character",
    "sample_scene",
]
