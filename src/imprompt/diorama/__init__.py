"""The embedded world: small 3-D scenes whose every detail is known."""

from imprompt.diorama.captions import (
    NUM_PHRASINGS,
    Phrases,
    caption,
    everyday_caption,
    phrases,
    portrait_caption,
    subject_caption,
)
from imprompt.diorama.maps import MAP_KINDS, draw_maps
from imprompt.diorama.people import (
    FACTORS,
    character_number,
    character_of_number,
    differences,
    gallery,
    portrait,
    reference_seed,
    training_portrait,
    training_scene,
)
from imprompt.diorama.rendering import Render, landmarks_of, render
from imprompt.diorama.scene import Character, Scene, sample_character, sample_scene
from imprompt.diorama.vocabulary import COLOURS, KINDS, OBJECT_KINDS, SETTINGS, STYLES

__all__ = [
    "COLOURS",
    "FACTORS",
    "KINDS",
    "MAP_KINDS",
    "NUM_PHRASINGS",
    "OBJECT_KINDS",
    "SETTINGS",
    "STYLES",
    "Character",
    "Phrases",
    "Render",
    "Scene",
    "caption",
    "character_number",
    "character_of_number",
    "differences",
    "draw_maps",
    "everyday_caption",
    "gallery",
    "landmarks_of",
    "phrases",
    "portrait",
    "portrait_caption",
    "reference_seed",
    "render",
    "sample_character",
    "sample_scene",
    "subject_caption",
    "training_portrait",
    "training_scene",
]
