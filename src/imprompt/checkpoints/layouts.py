"""The file layouts of image-prompt adapters, each turned into the official keys.

    native       official keys, with metadata of ours
    official     `image_proj.*` and `ip_adapter.{i}.*`, flat (safetensors) or as two dicts (.bin)
    diffusers    inside a UNet's own state dict: `encoder_hid_proj.*` and `*.processor.to_k_ip.0.*`
    training     what the authors' training scripts leave: `image_proj_model.*`, `adapter_modules.*`

Only names are dealt with here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from imprompt.checkpoints.messages import listed, one_line
from imprompt.checkpoints.unet_names import PROJECTION_KEY, from_processors, from_unet
from imprompt.core.errors import ImpromptError

NATIVE_FORMAT = "imprompt"  # value of the metadata's "format"
WRITTEN_LAYOUTS = ("native", "official", "diffusers")
ENVELOPES = ("state_dict", "module")  # Lightning and DeepSpeed put the weights under these


class Checkpoint(NamedTuple):
    """An adapter's tensors under official keys, whatever the file called them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    layout: str  # one of the names above


def to_official(content: Mapping[Any, Any], metadata: Mapping[str, str]) -> Checkpoint:
    """Recognise the layout of a file's content and rename its tensors.

    Raises:
        ImpromptError: no known layout; the message names some of the keys.
    """
    tensors = flat(content)

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in tensors)

    if has("image_proj.") or has("ip_adapter."):
        layout = "native" if metadata.get("format") == NATIVE_FORMAT else "official"
        return Checkpoint(tensors, dict(metadata), layout)
    if has("image_proj_model.") or has("adapter_modules."):
        return Checkpoint(from_training(tensors), dict(metadata), "training")
    if any(PROJECTION_KEY.fullmatch(key) for key in tensors):
        return Checkpoint(from_unet(tensors), dict(metadata), "diffusers")
    some = ", ".join(one_line(key) for key in sorted(tensors)[:3]) or "none"
    raise ImpromptError(
        f"no image-prompt adapter: its {len(tensors)} tensors ({some}, …) are under none of the "
        "known names (image_proj.* and ip_adapter.*, or those of diffusers or of the authors' "
        "training scripts)."
    )


def flat(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors by name, out of the dicts and the prefixes that programs wrap them in."""
    for envelope in ENVELOPES:
        if isinstance(content.get(envelope), Mapping):
            content = content[envelope]
    if isinstance(content.get("image_proj"), Mapping):
        names = {"adapter_modules": "ip_adapter"}  # as some files call it
        content = {
            f"{names.get(part, part)}.{key}": value
            for part, tensors in content.items()
            if isinstance(tensors, Mapping)
            for key, value in tensors.items()
        }
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            # DistributedDataParallel and torch.compile each put their mark on every name.
            name = key.removeprefix("module.").replace("_orig_mod.", "")
            if name in tensors:
                raise ImpromptError(f"damaged: {listed([name])} is there twice.")
            tensors[name] = value
    return tensors


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
