"""From prompts to images."""

from imprompt.generation.conditions import TokenPrompt
from imprompt.generation.pipeline import generate, latents_to_images
from imprompt.generation.prompts import ImagePrompt
from imprompt.generation.sampler import initial_noise, sample_latents

__all__ = [
    "ImagePrompt",
    "TokenPrompt",
    "generate",
    "initial_noise",
    "latents_to_images",
    "sample_latents",
]
