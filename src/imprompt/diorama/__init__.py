"""The embedded world: small 3-D scenes whose every detail is known."""

from imprompt.diorama.captions import NUM_PHRASINGS, caption, everyday_caption
from imprompt.diorama.maps import MAP_KINDS, draw_maps
from imprompt.diorama.rendering import Render, render
from imprompt.diorama.scene import Character, Scene, sample_character, sample_scene
from imprompt.diorama.vocabulary import COLOURS, KINDS, OBJECT_KINDS, SETTINGS, STYLES

__all__ = [
    "COLOURS",
    "KINDS",
    "MAP_KINDS",
    "NUM_PHRASINGS",
    "OBJECT_KINDS",
    "SETTINGS",
    "STYLES",
    "Character",
    "Render",
    "Scene",
    "caption",
    "draw_maps",
    "everyday_caption",
    "render",
    "sample_character",
    "sample_scene",
]
