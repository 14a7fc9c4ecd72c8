"""Names that an adapter's tensors have inside a UNet into which diffusers has loaded it.

    image_proj.*                  ⇄  encoder_hid_proj.image_projection_layers.0.*
    ip_adapter.{i}.to_k_ip.weight ⇄  {site}.processor.to_k_ip.0.weight
    ip_adapter.{i}.to_q_lora.*    ⇄  {site}.to_q.lora_A.faceid_0.weight, lora_B      (as PEFT names)

One table serves both directions. `{site}` is the name of an attention layer. Every transformer
block has two, `attn1` (self-attention, an even number) and `attn2` (cross-attention, odd).
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from imprompt.adapters import ImagePromptAdapter, family_of
from imprompt.checkpoints.messages import listed
from imprompt.checkpoints.published import resampler_of
from imprompt.core.errors import ImpromptError

# Our prefix → diffusers'. `{j}` stands for a layer's number.
LAYER_NAMES = {
    "layers.{j}.0.norm1.": "layers.{j}.ln0.",
    "layers.{j}.0.norm2.": "layers.{j}.ln1.",
    "layers.{j}.0.to_q.": "layers.{j}.attn.to_q.",
    "layers.{j}.0.to_kv.": "layers.{j}.attn.to_kv.",  # itself split into to_k and to_v
    "layers.{j}.0.to_out.": "layers.{j}.attn.to_out.0.",
    "layers.{j}.1.0.": "layers.{j}.ff.0.",
    "layers.{j}.1.1.": "layers.{j}.ff.1.net.0.proj.",
    "layers.{j}.1.3.": "layers.{j}.ff.1.net.2.",
}
PROJECTION_NAMES = {
    "base": {"proj.": "image_embeds."},
    "plus": LAYER_NAMES,
    "full": {"proj.0.": "ff.net.0.proj.", "proj.2.": "ff.net.2.", "proj.3.": "norm."},
    "faceid": {"proj.0.": "ff.net.0.proj.", "proj.2.": "ff.net.2."},
    "faceid-plus": {
        "proj.0.": "proj.net.0.proj.",
        "proj.2.": "proj.net.2.",
        **{f"perceiver_resampler.{ours}": theirs for ours, theirs in LAYER_NAMES.items()},
        **{f"perceiver_resampler.{part}.": f"{part}." for part in ("proj_in", "proj_out")},
        "perceiver_resampler.norm_out.": "norm_out.",
    },
}
LORA_HALVES = {"down": "lora_A", "up": "lora_B"}
NUM_LAYERS = 4  # of every resampler that diffusers builds
NUM_TOKENS = 4  # of its base and faceid-plus projections

PROJECTION = "encoder_hid_proj.image_projection_layers"
SITE = r"(?:unet\.)?((?:down_blocks|up_blocks|mid_block)\..+?)"
PROJECTION_KEY = re.compile(rf"(?:unet\.)?{re.escape(PROJECTION)}\.(\d+)\.(.+)")
# "processor.to_k_ip.0.weight" in diffusers; without the number, and with LoRA, in training scripts.
PROCESSOR_KEY = re.compile(rf"{SITE}\.processor\.(to_[kv]_ip)\.(?:\d+\.)?weight")
PROCESSOR_LORA_KEY = re.compile(rf"{SITE}\.processor\.(to_(?:q|k|v|out)_lora)\.(down|up)\.weight")
PEFT_LORA_KEY = re.compile(rf"{SITE}\.(to_(?:q|k|v|out))(?:\.0)?\.(lora_[AB])\.faceid_0\.weight")
OWN_KEY = re.compile(rf"{SITE}\.to_k\.(?:base_layer\.)?weight")


def from_unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter in a UNet's state dict, under official keys.

    Raises:
        ImpromptError: several adapters; or sites of the UNet without the adapter's weights.
    """
    found = [match for key in tensors if (match := PROJECTION_KEY.fullmatch(key))]
    adapters = {match[1] for match in found}
    if len(adapters) > 1:
        raise ImpromptError(
            f"{len(adapters)} adapters in one file: save a UNet with one of them loaded."
        )
    theirs = join_key_value({match[2]: tensors[match[0]] for match in found})
    names = PROJECTION_NAMES[variant_of(theirs)]
    projection = {f"image_proj.{renamed(k, names, back=True)}": v for k, v in theirs.items()}
    if len(projection) < len(theirs):
        raise ImpromptError("damaged: two names for the same tensor of the image projection.")
    return projection | from_processors(tensors)


def to_unet(
    tensors: Mapping[str, Tensor], variant: str, site_names: Sequence[str]
) -> dict[str, Tensor]:
    """Official keys → those of a UNet: the inverse of `from_unet`.

    Args:
        variant: one of PROJECTION_NAMES.
        site_names: of the UNet's cross-attention layers ("mid_block.….attn2"), in order.
    """
    names = PROJECTION_NAMES[variant]
    theirs: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        part, rest = key.split(".", 1)
        if part == "image_proj":
            theirs[f"{PROJECTION}.0.{renamed(rest, names)}"] = tensor
            continue
        index, name, *tail = rest.split(".")
        site = site_names[int(index) // 2]
        if int(index) % 2 == 0:
            site = site.removesuffix("attn2") + "attn1"
        if name.endswith("_lora"):
            layer = name.removesuffix("_lora") + (".0" if name == "to_out_lora" else "")
            theirs[f"{site}.{layer}.{LORA_HALVES[tail[0]]}.faceid_0.weight"] = tensor
        else:
            theirs[f"{site}.processor.{name}.0.weight"] = tensor
    return split_key_value(theirs)


def from_processors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`ip_adapter.*` out of the names of attention layers inside a UNet."""
    found: list[tuple[str, str, str]] = []  # site, the rest of our name, key
    for key in tensors:
        if match := PROCESSOR_KEY.fullmatch(key):
            found.append((match[1], match[2], key))
        elif match := PROCESSOR_LORA_KEY.fullmatch(key):
            found.append((match[1], f"{match[2]}.{match[3]}", key))
        elif match := PEFT_LORA_KEY.fullmatch(key):
            half = {theirs: ours for ours, theirs in LORA_HALVES.items()}[match[3]]
            found.append((match[1], f"{match[2]}_lora.{half}", key))
    own = {match[1] for key in tensors if (match := OWN_KEY.fullmatch(key))}
    cross = {site for site in own if site.endswith("attn2")}
    bare = sorted(cross - {site for site, _, _ in found}, key=block_order)
    if found and bare:
        raise ImpromptError(f"damaged: no adapter weights at {listed(bare)}.")
    blocks = sorted({block_of(site) for site, _, _ in found}, key=block_order)
    number = {block: 2 * position for position, block in enumerate(blocks)}
    official: dict[str, Tensor] = {}
    for site, rest, key in found:
        index = number[block_of(site)] + (not site.endswith("attn1"))
        name = f"ip_adapter.{index}.{rest}.weight"
        if name in official:
            raise ImpromptError(f"damaged: {listed([key])} is there twice, under two names.")
        official[name] = tensors[key]
    return official


def known_site_names(cross_attention_dim: int) -> list[tuple[str, int]]:
    """Name and width of each cross-attention layer of the family whose text states have this
    width, in order; empty where no family is known."""
    # Each stage: block, width, number of attentions, transformer blocks in each.
    if cross_attention_dim in (768, 1024):  # Stable Diffusion 1.x and 2.x
        widths = {"down_blocks.0": 320, "down_blocks.1": 640, "down_blocks.2": 1280}
        stages = [(block, width, 2, 1) for block, width in widths.items()]
        widths = {"up_blocks.1": 1280, "up_blocks.2": 640, "up_blocks.3": 320}
        stages += [(block, width, 3, 1) for block, width in widths.items()]
        stages += [("mid_block", 1280, 1, 1)]
    elif cross_attention_dim == 2048:  # Stable Diffusion XL
        stages = [("down_blocks.1", 640, 2, 2), ("down_blocks.2", 1280, 2, 10)]
        stages += [("up_blocks.0", 1280, 3, 10), ("up_blocks.1", 640, 3, 2)]
        stages += [("mid_block", 1280, 1, 10)]
    else:
        stages = []
    return [
        (f"{block}.attentions.{attention}.transformer_blocks.{layer}.attn2", width)
        for block, width, num_attentions, depth in stages
        for attention in range(num_attentions)
        for layer in range(depth)
    ]


def unet_site_names(
    adapter: ImagePromptAdapter, site_names: Sequence[str] | None = None
) -> list[str]:
    """Where in a UNet the adapter's cross-attention sites are, in order.

    Args:
        site_names: those of its UNet; by default those of the family of this text width.

    Raises:
        ImpromptError: no known family, a UNet with other sites, or what diffusers cannot hold.
    """
    cross = {index: site for index, site in adapter.site_weights.items() if site.is_cross}
    if site_names is None:
        known = known_site_names(adapter.cross_attention_dim)
        if [site.to_k_ip.out_features for site in cross.values()] != [w for _, w in known]:
            raise ImpromptError(
                f"diffusers' layout names the layers of a UNet, and which UNet this adapter of "
                f"{len(cross)} sites ({family_of(adapter.cross_attention_dim)}) is for cannot be "
                "told from its weights: name its base (--base), or choose another layout."
            )
        site_names = [name for name, _ in known]
    if len(site_names) != len(cross) or any(not name.endswith("attn2") for name in site_names):
        raise ImpromptError(
            f"This adapter has {len(cross)} cross-attention sites, and the UNet has "
            f"{len(site_names)}: name the base that it was made for."
        )
    if list(cross) != list(range(1, 2 * len(cross), 2)):
        raise ImpromptError(
            "This adapter's UNet has other attention layers than those of transformer blocks, "
            "which diffusers' loader cannot count: choose the layout native or official."
        )
    return list(site_names)


def check_held(adapter: ImagePromptAdapter) -> None:
    """Raise an ImpromptError if diffusers has no module for such a projection."""
    reason = ""
    layers = resampler_of(adapter)
    if adapter.variant not in PROJECTION_NAMES:
        reason = f"diffusers has {', '.join(PROJECTION_NAMES)}, but no {adapter.variant} adapter"
    elif adapter.variant in ("base", "faceid-plus") and adapter.num_tokens != NUM_TOKENS:
        reason = (
            f"diffusers takes every {adapter.variant} adapter to have {NUM_TOKENS} tokens; "
            f"this one has {adapter.num_tokens}"
        )
    elif layers is not None and layers.num_layers != NUM_LAYERS:
        reason = (
            f"diffusers builds resamplers of {NUM_LAYERS} layers; this one has {layers.num_layers}"
        )
    elif adapter.projection.features[0].length is not None:
        reason = "diffusers builds resamplers without positions; this one has them"
    if reason:
        raise ImpromptError(f"{reason}: choose the layout native or official.")


def block_of(site: str) -> str:
    return site.removesuffix(".attn1").removesuffix(".attn2")


def block_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Sorts names of attention layers as `unet.attn_processors` does: down, up, mid."""
    first, *rest = name.split(".")
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in rest]
    return ("down_blocks", "up_blocks", "mid_block").index(first), parts


def variant_of(theirs: Mapping[str, Tensor]) -> str:
    """Which of diffusers' image projections this is, from its keys."""
    if any(key.startswith("image_embeds.") for key in theirs):
        return "base"
    if any(key.startswith("proj.net.") for key in theirs):
        return "faceid-plus"
    if any(key.startswith("ff.net.") for key in theirs):
        first = theirs.get("ff.net.0.proj.weight")  # a face's embedding is widened there
        return "full" if first is not None and first.shape[:1] == first.shape[1:] else "faceid"
    return "plus"


def renamed(key: str, names: Mapping[str, str], *, back: bool = False) -> str:
    """A key with its prefix replaced; the longest that fits, and none where none fits."""
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    number = layer[1] if layer else ""
    pairs = [(theirs, ours) if back else (ours, theirs) for ours, theirs in names.items()]
    for old, new in sorted(pairs, key=lambda pair: -len(pair[0])):
        prefix = old.replace("{j}", number)
        if key.startswith(prefix):
            return new.replace("{j}", number) + key.removeprefix(prefix)
    return key


def join_key_value(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers keeps `to_k` and `to_v` of a resampler apart; the official files join them."""
    joined: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        value = tensors.get(key.replace(".attn.to_k.", ".attn.to_v."))
        if ".attn.to_k." in key and value is not None:
            if tensor.shape != value.shape or tensor.ndim != 2:
                raise ImpromptError(
                    f"damaged: {listed([key])} has the shape {tuple(tensor.shape)}, and its value "
                    f"{tuple(value.shape)}."
                )
            joined[key.replace(".attn.to_k.", ".attn.to_kv.")] = torch.cat([tensor, value])
        elif ".attn.to_v." not in key or key.replace(".to_v.", ".to_k.") not in tensors:
            joined[key] = tensor
    return joined


def split_key_value(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `join_key_value`."""
    split: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if ".attn.to_kv." in key:
            first, second = tensor.chunk(2)
            split[key.replace(".to_kv.", ".to_k.")] = first.contiguous()
            split[key.replace(".to_kv.", ".to_v.")] = second.contiguous()
        else:
            split[key] = tensor
    return split
