"""Adapters on disk: load, save, and say what a file is."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from imprompt.adapters import Feature, ImagePromptAdapter, family_of
from imprompt.adapters.projection import FacePlusProjection, FullProjection
from imprompt.checkpoints.detection import build
from imprompt.checkpoints.folders import check_is_no_other_folder
from imprompt.checkpoints.layouts import (
    NATIVE_FORMAT,
    WRITTEN_LAYOUTS,
    Checkpoint,
    to_official,
)
from imprompt.checkpoints.messages import listed, one_line
from imprompt.checkpoints.published import PORTRAIT, published_name, resampler_of
from imprompt.checkpoints.reading import read_content
from imprompt.checkpoints.unet_names import check_held, to_unet, unet_site_names
from imprompt.core.errors import ImpromptError
from imprompt.core.shipped import ADAPTERS, file_named
from imprompt.core.tensor_files import write_tensors

FORMAT_VERSION = "1"
# Values of "reads" in the metadata of Plus adapters that read identity vectors: those of length 1,
# as ours do, or as the face encoder gives them, as InstantID's published file does. That says nothing
# of it, but no published image encoder's states are as narrow as an identity vector.
READS_FACES = "id_embeds"
READS_RAW_FACES = "raw id_embeds"
IDENTITY_DIM = 512
# The second generation of face-id-plus has the same keys as the first and is known by its name; for
# Stable Diffusion XL, by the width of its text states, only the second was published.
SHORTCUT_NAME = "plusv2"
SHORTCUT_ONLY_WIDTH = 2048
# Written by us from the weights themselves, so not carried over from the file before.
FACTS = {"format_version", "variant", "cross_attention_dim", "sites", "num_tokens", "shortcut"}


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What a checkpoint file holds."""

    path: Path
    layout: str
    """native, official, diffusers or training"""
    variant: str
    published_name: str | None
    """which published file has these shapes, if any has"""
    base_family: str
    """which models it fits, from the width of the text states"""
    cross_attention_dim: int
    num_tokens: int | None
    """per image; None where there are as many as the encoder gives"""
    num_sites: int
    """cross-attention sites"""
    num_parameters: int
    num_heads: int | None
    """of the resampler; None without one"""
    num_layers: int | None
    """of the resampler; None without one"""
    lora_rank: int
    """0 without LoRA"""
    shortcut: bool | None
    """of face-id-plus, whether it is read as its second generation; None for others"""
    dtype: str
    features: tuple[Feature, ...]
    """what the adapter reads"""
    size_bytes: int
    metadata: dict[str, str]


def load_adapter(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    shortcut: bool | None = None,
) -> ImagePromptAdapter:
    """An adapter from a file of any known layout; what it is, is read from its keys and shapes.

    Known are the authors' `.bin` and `.safetensors`, the UNet state of diffusers, the state of
    the authors' training scripts, and our own. Nothing in a file is executed.

    Args:
        path: a file; "diorama" or "diorama-instruct", the adapters that come with the embedded base; or a file on
            the hub, such as "h94/IP-Adapter:models/ip-adapter_sd15.safetensors".
        dtype: of the weights; None keeps the file's.
        shortcut: of face-id-plus, whether it is of the second generation ("plusv2"), which the
            weights do not tell. By default what the file's metadata or name says, and yes for
            Stable Diffusion XL, for which there is no other.

    Raises:
        ImpromptError: no such file, unreadable, damaged, or not an adapter; or a `shortcut` for
            another variant.
    """
    path = file_named(path, ADAPTERS)
    checkpoint, adapter, _ = read_adapter(path)
    if shortcut is not None:
        if not isinstance(adapter.image_proj, FacePlusProjection):
            raise ImpromptError(
                f"{path} is a {adapter.variant} adapter: only faceid-plus has a shortcut."
            )
        adapter.image_proj.shortcut = shortcut
    tensors = {
        key: tensor.to(device=device, dtype=dtype) for key, tensor in checkpoint.tensors.items()
    }
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ImpromptError(f"{path} is damaged: numbers that are not finite in {listed(broken)}.")
    adapter.load_state_dict(tensors, assign=True)
    return adapter.requires_grad_()


def save_adapter(
    adapter: ImagePromptAdapter,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    layout: str = "native",
    dtype: torch.dtype | None = None,
    site_names: Sequence[str] | None = None,
) -> None:
    """Write an adapter as safetensors, by default with exactly the official keys.

    diffusers, ComfyUI and the authors' code load it as it is. The file appears under its name
    when it is complete, or not at all.

    Args:
        path: ends with ".safetensors"; missing folders are made.
        metadata: is stored in the file beside what `adapter.metadata` holds, e.g. {"base": …}.
        layout: "native"; "official", the same keys without our mark; or "diffusers", the keys of
            the state dict of a UNet into which diffusers has loaded the adapter.
        dtype: of the file, e.g. torch.float16; None keeps the adapter's.
        site_names: for "diffusers": names of the UNet's cross-attention layers, in order. They
            are known for Stable Diffusion 1.x, 2.x and XL.

    Raises:
        ImpromptError: another ending or layout; numbers that are not finite, or not in this
            dtype; an adapter that diffusers cannot hold; or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ImpromptError(f'{path} does not end with ".safetensors", the only format written.')
    if layout not in WRITTEN_LAYOUTS:
        raise ImpromptError(f'layout is "{layout}"; written are {", ".join(WRITTEN_LAYOUTS)}.')
    tensors = {
        key: tensor.detach().to("cpu", dtype).contiguous()
        for key, tensor in adapter.state_dict().items()
    }
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ImpromptError(
            f"{path} was not written: numbers that are not finite, or too large for "
            f"{dtype or 'their type'}, in {listed(broken)}."
        )
    if layout == "diffusers":
        check_held(adapter)
        tensors = to_unet(tensors, adapter.variant, unet_site_names(adapter, site_names))
    # "pt" is what other programs write there; some of them look for it.
    form = {"format": NATIVE_FORMAT if layout == "native" else "pt"}
    write_tensors(tensors, path, adapter.metadata | dict(metadata or {}) | facts_of(adapter) | form)


def inspect(path: str | os.PathLike[str]) -> AdapterInfo:
    """What is this file? Variant, base, tokens, parameters.

    Raises:
        ImpromptError: as `load_adapter`.
    """
    path = file_named(path, ADAPTERS)
    checkpoint, adapter, size_bytes = read_adapter(path, with_values=False)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values()})
    layers = resampler_of(adapter)
    return AdapterInfo(
        path=path,
        layout=checkpoint.layout,
        variant=adapter.variant,
        published_name=published_name(adapter, path.name),
        base_family=family_of(adapter.cross_attention_dim),
        cross_attention_dim=adapter.cross_attention_dim,
        num_tokens=adapter.num_tokens,
        num_sites=sum(site.is_cross for site in adapter.site_weights.values()),
        num_parameters=sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        num_heads=layers and layers.num_heads,
        num_layers=layers and layers.num_layers,
        lora_rank=adapter.lora_rank,
        shortcut=adapter.image_proj.shortcut
        if isinstance(adapter.image_proj, FacePlusProjection)
        else None,
        dtype=", ".join(dtypes),
        features=adapter.projection.features,
        size_bytes=size_bytes,
        metadata=checkpoint.metadata,
    )


class Read(NamedTuple):
    """A file's tensors under official keys, and the adapter they belong to, still without them."""

    checkpoint: Checkpoint
    adapter: ImagePromptAdapter
    size_bytes: int


def read_adapter(path: Path, *, with_values: bool = True) -> Read:
    """What is in a file, its numbers not yet looked at.

    Args:
        with_values: whether the tensors of the checkpoint are needed, or only their shapes.
    """
    if path.is_dir():
        check_is_no_other_folder(path)
    content = read_content(path, with_values=with_values)
    try:
        checkpoint = to_official(content.values, content.metadata)
        metadata = checkpoint.metadata
        adapter = build(checkpoint.tensors, declared_sites(metadata))
        # Without this, many names for the same few bytes would fill the memory.
        own_bytes = sum(size_bytes_of(tensor) for tensor in checkpoint.tensors.values())
        if own_bytes > content.size_bytes:
            raise ImpromptError(
                f"damaged: {own_bytes:,} bytes of weights in a file of {content.size_bytes:,}."
            )
        told = metadata.get("variant", adapter.variant)
        if checkpoint.layout == "native" and told != adapter.variant:
            raise ImpromptError(
                f"damaged: it says to be {one_line(told)}, but its weights are {adapter.variant}."
            )
    except ImpromptError as error:
        raise ImpromptError(f"{path} is {error}") from None
    adapter.metadata = {
        key: value for key, value in metadata.items() if key not in FACTS | {"format"}
    }
    projection = adapter.image_proj
    if isinstance(projection, FacePlusProjection):
        projection.shortcut = (
            metadata["shortcut"] == "true"
            if "shortcut" in metadata
            else SHORTCUT_NAME in path.name.lower().replace("-", "").replace("_", "")
            or adapter.cross_attention_dim == SHORTCUT_ONLY_WIDTH
        )
    is_foreign = checkpoint.layout != "native"
    if (
        is_foreign
        and adapter.variant == "plus"
        and adapter.projection.features[0].dim == IDENTITY_DIM
    ):
        adapter.metadata.setdefault("reads", READS_RAW_FACES)
        if published_name(adapter, path.name) == PORTRAIT:
            adapter.metadata.setdefault("published", PORTRAIT)
    if isinstance(projection, FullProjection):
        projection.num_tokens = positive_number(metadata.get("num_tokens", ""))
    return Read(checkpoint, adapter, content.size_bytes)


def declared_sites(metadata: Mapping[str, str]) -> list[int] | None:
    """The numbers of the cross-attention sites that our own files tell.

    Raises:
        ImpromptError: they are no numbers.
    """
    if "sites" not in metadata:
        return None
    sites = [positive_number(part) for part in metadata["sites"].split(",")]
    if None in sites:
        raise ImpromptError(f"damaged: its sites are {one_line(metadata['sites'])}.")
    return [site for site in sites if site is not None]


def positive_number(text: str) -> int | None:
    is_number = text.isascii() and text.isdecimal() and len(text) < 7
    return int(text) or None if is_number else None


def size_bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def facts_of(adapter: ImagePromptAdapter) -> dict[str, str]:
    """What is written beside the weights, because they do not tell it or to check them."""
    cross = [index for index, site in adapter.site_weights.items() if site.is_cross]
    facts = {
        "format_version": FORMAT_VERSION,
        "variant": adapter.variant,
        "cross_attention_dim": str(adapter.cross_attention_dim),
        "sites": ",".join(map(str, cross)),
    }
    if adapter.num_tokens is not None:
        facts["num_tokens"] = str(adapter.num_tokens)
    if isinstance(adapter.image_proj, FacePlusProjection):
        facts["shortcut"] = str(adapter.image_proj.shortcut).lower()
    return facts
