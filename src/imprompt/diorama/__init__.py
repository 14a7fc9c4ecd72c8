"""The embedded world: small 3-D scenes whose every detail is known."""

from imprompt.diorama.captions import NUM_PHRASINGS, caption, everyday_caption, portrait_caption
from imprompt.diorama.people import (
    FACTORS,
    character_number,
    character_of_number,
    differences,
    gallery,
    portrait,
    reference_seed,
    training_portrait,
)
from imprompt.diorama.rendering import Render, landmarks_of, render
from imprompt.diorama.scene import Character, Scene, sample_character, sample_scene
from imprompt.diorama.vocabulary import COLOURS, KINDS, OBJECT_KINDS, SETTINGS, STYLES

__all__ = [
    "COLOURS",
    "FACTORS",
    "KINDS",
    "NUM_PHRASINGS",
    "OBJECT_KINDS",
    "SETTINGS",
    "STYLES",
    "Character",
    "Render",
    "Scene",
    "caption",
    "character_number",
    "character_of_number",
    "differences",
    "everyday_caption",
    "gallery",
    "landmarks_of",
    "portrait",
    "portrait_caption",
    "reference_seed",
    "render",
    "sample_character",
    "sample_scene",
    "training_portrait",
]
