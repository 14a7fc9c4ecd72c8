"""Image-prompt adapters in pure torch: the whole method of IP-Adapter and its family.

Read in this order: `projection` and `resampler` (features → tokens), `attention` (decoupled
cross-attention), `sites` (where it happens), `adapter` (all weights), `handle` (on a UNet and off).
"""

from imprompt.adapters.adapter import (
    VARIANTS,
    ImagePromptAdapter,
    Variant,
    add_lora,
    create_adapter,
)
from imprompt.adapters.conditions import combine
from imprompt.adapters.features import Feature
from imprompt.adapters.handle import Handle
from imprompt.adapters.sites import Number, Scale, Site, attention_sites, family_of

__all__ = [
    "VARIANTS",
    "Feature",
    "Handle",
    "ImagePromptAdapter",
    "Number",
    "Scale",
    "Site",
    "Variant",
    "add_lora",
    "attention_sites",
    "combine",
    "create_adapter",
    "family_of",
]
