"""The published adapters, known again by their sizes.

Several published files may be of one size (an adapter and its version for faces, say). Then the
file's own name decides, or all of them are told.
"""

from typing import NamedTuple

from torch import nn

from imprompt.adapters import ImagePromptAdapter
from imprompt.adapters.resampler import HEAD_DIM

FACE_LORA_RANK = 128
# Of InstantID's sizes, but trained with another face encoder: see imprompt.encoders.face.PACKS.
PORTRAIT = "ip-adapter-faceid-portrait_sdxl_unnorm"

# (variant, text width, width of the first feature, tokens, LoRA rank) → names of published files.
# Of the feature widths, 1024 is ViT-H's embedding, 1280 its hidden states or ViT-bigG's embedding,
# and 512 the embedding of a face.
PUBLISHED: dict[tuple[str, int, int, int | None, int], tuple[str, ...]] = {
    ("base", 768, 1024, 4, 0): ("ip-adapter_sd15", "ip-adapter_sd15_light"),
    ("base", 768, 1280, 4, 0): ("ip-adapter_sd15_vit-G",),
    ("base", 2048, 1280, 4, 0): ("ip-adapter_sdxl",),
    ("base", 2048, 1024, 4, 0): ("ip-adapter_sdxl_vit-h",),
    ("plus", 768, 1280, 16, 0): ("ip-adapter-plus_sd15", "ip-adapter-plus-face_sd15"),
    ("plus", 2048, 1280, 16, 0): (
        "ip-adapter-plus_sdxl_vit-h",
        "ip-adapter-plus-face_sdxl_vit-h",
    ),
    ("plus", 2048, 512, 16, 0): ("InstantID", PORTRAIT),
    ("full", 768, 1280, None, 0): ("ip-adapter-full-face_sd15",),
    ("faceid", 768, 512, 4, FACE_LORA_RANK): ("ip-adapter-faceid_sd15",),
    ("faceid", 2048, 512, 4, FACE_LORA_RANK): ("ip-adapter-faceid_sdxl",),
    ("faceid", 768, 512, 16, 0): (
        "ip-adapter-faceid-portrait_sd15",
        "ip-adapter-faceid-portrait-v11_sd15",
    ),
    ("faceid", 2048, 512, 16, 0): ("ip-adapter-faceid-portrait_sdxl",),
    ("faceid-plus", 768, 512, 4, FACE_LORA_RANK): (
        "ip-adapter-faceid-plus_sd15",
        "ip-adapter-faceid-plusv2_sd15",
    ),
    ("faceid-plus", 2048, 512, 4, FACE_LORA_RANK): ("ip-adapter-faceid-plusv2_sdxl",),
    ("instruct", 768, 1280, 16, 0): ("IP-Adapter-Instruct for SD 1.5",),
    ("instruct", 2048, 1280, 16, 0): ("IP-Adapter-Instruct for SDXL",),
}
# Known under this name far more than under the others of its size, and stored as "ip-adapter.bin".
BY_DEFAULT = "InstantID"


class Layers(NamedTuple):
    """Size of a resampler."""

    num_layers: int
    num_heads: int


def published_name(adapter: ImagePromptAdapter, file_name: str) -> str | None:
    """Which published files have these sizes, joined by "or"; None if none has."""
    size = (
        adapter.variant,
        adapter.cross_attention_dim,
        adapter.projection.features[0].dim,
        None if adapter.variant == "full" else adapter.num_tokens,
        adapter.lora_rank,
    )
    names = PUBLISHED.get(size, ())
    stem = file_name.lower().split(".")[0]
    same = [name for name in names if name.lower() == stem]
    if same or BY_DEFAULT in names:
        return same[0] if same else BY_DEFAULT
    if adapter.variant == "faceid-plus":
        is_second = bool(getattr(adapter.image_proj, "shortcut", False))
        names = tuple(name for name in names if ("plusv2" in name) == is_second)
    return " or ".join(names) or None


def resampler_of(adapter: ImagePromptAdapter) -> Layers | None:
    """How large the adapter's resampler is; None without one."""
    projection = adapter.image_proj
    owner = getattr(projection, "perceiver_resampler", projection)
    layers = getattr(owner, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return None
    query = layers[0].get_submodule("0.to_q")
    assert isinstance(query, nn.Linear)
    return Layers(len(layers), query.out_features // HEAD_DIM)
