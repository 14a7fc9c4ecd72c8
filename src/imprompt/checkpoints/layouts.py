"""The file layouts of image-prompt adapters, each turned into the official keys.

    native       official keys, with metadata of ours
    official     `image_proj.*` and `ip_adapter.{i}.*`, flat (safetensors) or as two dicts (.bin)
    diffusers    inside a UNet's own state dict: `encoder_hid_proj.*` and `*.processor.to_k_ip.0.*`
    training     what the authors' training scripts leave: `image_proj_model.*`, `adapter_modules.*`

Only names are dealt with here, and the two tensors that diffusers splits where the others join.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprompt.core.errors import ImpromptError

NATIVE_FORMAT = "imprompt"  # value of the metadata's "format"

# A name of diffusers' image projections → ours. `{j}` stands for a layer's number.
LAYER_NAMES = {
    "layers.{j}.ln0.": "layers.{j}.0.norm1.",
    "layers.{j}.ln1.": "layers.{j}.0.norm2.",
    "layers.{j}.attn.to_q.": "layers.{j}.0.to_q.",
    "layers.{j}.attn.to_kv.": "layers.{j}.0.to_kv.",
    "layers.{j}.attn.to_out.0.": "layers.{j}.0.to_out.",
    "layers.{j}.ff.0.": "layers.{j}.1.0.",
    "layers.{j}.ff.1.net.0.proj.": "layers.{j}.1.1.",
    "layers.{j}.ff.1.net.2.": "layers.{j}.1.3.",
}
RESAMPLER_PARTS = ("layers.", "proj_in.", "proj_out.", "norm_out.")

PROCESSOR_KEY = re.compile(
    r"(?:unet\.)?((?:down_blocks|up_blocks|mid_block)\..+)\.processor\.(to_[kv]_ip)\.(?:(\d+)\.)?weight"
)
PROJECTION_KEY = re.compile(r"(?:unet\.)?encoder_hid_proj\.image_projection_layers\.(\d+)\.(.+)")


class Checkpoint(NamedTuple):
    """An adapter's tensors under official keys, whatever the file called them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    layout: str  # one of the names above


def to_official(content: Mapping[str, Any], metadata: Mapping[str, str]) -> Checkpoint:
    """Recognise the layout of a file's content and rename its tensors.

    Raises:
        ImpromptError: no known layout; the message names some of the keys.
    """
    content = content.get("state_dict", content)
    if isinstance(content.get("image_proj"), Mapping):
        content = {
            f"{part}.{key}": value
            for part, tensors in content.items()
            if isinstance(tensors, Mapping)
            for key, value in tensors.items()
        }
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in tensors)

    if has("image_proj.") or has("ip_adapter."):
        layout = "native" if metadata.get("format") == NATIVE_FORMAT else "official"
        return Checkpoint(tensors, dict(metadata), layout)
    if has("image_proj_model.") or has("adapter_modules."):
        return Checkpoint(from_training(tensors), dict(metadata), "training")
    if any(PROJECTION_KEY.fullmatch(key) for key in tensors):
        return Checkpoint(from_diffusers(tensors), dict(metadata), "diffusers")
    some = ", ".join(sorted(tensors)[:3]) or "none"
    raise ImpromptError(
        f"no image-prompt adapter: its {len(tensors)} tensors ({some}, …) are under none of the "
        "known names (image_proj.* and ip_adapter.*, or those of diffusers or of the authors' "
        "training scripts)."
    )


def from_training(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state that the authors' training scripts save, frozen UNet included.

    `adapter_modules.{i}` counts as `ip_adapter.{i}` does. Saved as safetensors these names are
    dropped in favour of the UNet's own for the same tensors.
    """
    official = {
        key.replace("image_proj_model.", "image_proj.", 1): tensor
        for key, tensor in tensors.items()
        if key.startswith("image_proj_model.")
    }
    modules = {
        key.replace("adapter_modules.", "ip_adapter.", 1): tensor
        for key, tensor in tensors.items()
        if key.startswith("adapter_modules.")
    }
    official |= modules or from_processors(tensors)
    if not any(key.startswith("ip_adapter.") for key in official):
        raise ImpromptError(
            "a training state without the adapter's attention weights (adapter_modules.*): "
            "convert the pytorch_model.bin of the same checkpoint instead."
        )
    return official


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's state dict into which diffusers has loaded one IP-Adapter."""
    found = [match for key in tensors if (match := PROJECTION_KEY.fullmatch(key))]
    adapters = sorted({match[1] for match in found})
    if len(adapters) > 1:
        raise ImpromptError(
            f"{len(adapters)} adapters in one file: save a UNet with one of them loaded."
        )
    projection = official_projection({match[2]: tensors[match[0]] for match in found})
    return {f"image_proj.{k}": v for k, v in projection.items()} | from_processors(tensors)


def from_processors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`ip_adapter.*` out of the names of attention processors inside a UNet.

    Every transformer block has a self-attention (even number) and then a cross-attention (odd).
    """
    found = [match for key in tensors if (match := PROCESSOR_KEY.fullmatch(key))]
    names = sorted({match[1] for match in found}, key=block_order)
    index = {name: 2 * position + 1 for position, name in enumerate(names)}
    return {f"ip_adapter.{index[match[1]]}.{match[2]}.weight": tensors[match[0]] for match in found}


def block_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Sorts names of attention layers as `unet.attn_processors` does: down, up, mid."""
    first, *rest = name.split(".")
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in rest]
    return ("down_blocks", "up_blocks", "mid_block").index(first), parts


def official_projection(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of diffusers' image projections → official ones; variants are told by their keys."""
    tensors = join_key_value(tensors)
    if "image_embeds.weight" in tensors:  # base
        return {key.replace("image_embeds.", "proj.", 1): v for key, v in tensors.items()}
    if "ff.net.0.proj.weight" in tensors:
        first = tensors["ff.net.0.proj.weight"]
        names = {"ff.net.0.proj.": "proj.0.", "ff.net.2.": "proj.2."}
        if first.shape[0] == first.shape[1]:  # full; the face projection widens there
            names["norm."] = "proj.3."
        return {renamed(key, names): v for key, v in tensors.items()}
    if "proj.net.0.proj.weight" in tensors:  # faceid-plus
        names = {"proj.net.0.proj.": "proj.0.", "proj.net.2.": "proj.2."}
        return {
            ("perceiver_resampler." if key.startswith(RESAMPLER_PARTS) else "")
            + renamed(key, names | LAYER_NAMES): v
            for key, v in tensors.items()
        }
    return {renamed(key, LAYER_NAMES): v for key, v in tensors.items()}  # plus


def renamed(key: str, names: Mapping[str, str]) -> str:
    layer = re.match(r"layers\.(\d+)\.", key)
    number = layer[1] if layer else ""
    for theirs, ours in names.items():
        prefix = theirs.replace("{j}", number)
        if key.startswith(prefix):
            return ours.replace("{j}", number) + key.removeprefix(prefix)
    return key


def join_key_value(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers keeps `to_k` and `to_v` of a resampler apart; the official files join them."""
    joined = {key: v for key, v in tensors.items() if ".to_k." not in key and ".to_v." not in key}
    for key, tensor in tensors.items():
        value_key = key.replace(".to_k.", ".to_v.")
        if value_key != key and value_key in tensors:
            joined[key.replace(".to_k.", ".to_kv.")] = torch.cat([tensor, tensors[value_key]])
    return joined
