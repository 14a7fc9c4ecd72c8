"""From prompts to images."""

from imprompt.generation.conditions import TokenPrompt
from imprompt.generation.controls import Control, MapControl
from imprompt.generation.explanation import Explanation
from imprompt.generation.features import ImageFeatures, encode_images
from imprompt.generation.identity import IdentityPrompt
from imprompt.generation.init_image import InitImage
from imprompt.generation.instructed import PublishedGuidance, published_guidance
from imprompt.generation.pipeline import generate, latents_to_images
from imprompt.generation.prompts import ImagePrompt
from imprompt.generation.sampler import initial_noise, sample_latents

__all__ = [
    "Control",
    "Explanation",
    "IdentityPrompt",
    "ImageFeatures",
    "ImagePrompt",
    "InitImage",
    "MapControl",
    "PublishedGuidance",
    "TokenPrompt",
    "encode_images",
    "generate",
    "initial_noise",
    "latents_to_images",
    "published_guidance",
    "sample_latents",
]
