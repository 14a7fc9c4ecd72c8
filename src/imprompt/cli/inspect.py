"""`imprompt inspect`: what a checkpoint is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imprompt.cli.verb import add_verb

if TYPE_CHECKING:
    from imprompt.checkpoints import AdapterInfo

MAX_VALUE = 120  # characters of a metadata's value; the file may hold a whole configuration


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "inspect",
        run,
        about="say what an adapter file is: variant, base, tokens, sites, parameters",
        examples="  imprompt inspect ip-adapter-plus_sd15.safetensors",
    )
    parser.add_argument(
        "file",
        type=Path,
        help=".safetensors or .bin, a training state's folder, diorama or diorama-instruct",
    )


def base_of(info: AdapterInfo) -> str:
    """Which models a file fits: a known family, or else the base that it says it was trained on."""
    from imprompt.adapters.sites import FAMILIES
    from imprompt.checkpoints.messages import one_line

    name = info.base_family
    if info.cross_attention_dim not in FAMILIES:  # which the family's name says, then
        if "base" not in info.metadata:
            return name
        name = one_line(info.metadata["base"])
    return f"{name} (text width {info.cross_attention_dim})"


def generation_of(info: AdapterInfo) -> dict[str, str]:
    """Of face-id-plus, which generation a file is read as, since its weights do not tell."""
    if info.shortcut is None:
        return {}
    if info.shortcut:
        return {"generation": "second (plusv2, with a shortcut for the identity vector)"}
    return {"generation": "first; if it is plusv2, name it so or load with shortcut=True"}


def run(arguments: argparse.Namespace) -> None:
    from imprompt.checkpoints import inspect
    from imprompt.checkpoints.messages import one_line

    info = inspect(arguments.file)
    rows = {
        "file": f"{info.path} ({info.size_bytes / 1e6:.1f} MB)",
        "layout": info.layout,
        "variant": info.variant,
        "shaped like": info.published_name or "no published adapter",
        "base": base_of(info),
        "reads": ", ".join(f"{feature.name} {feature.shape}" for feature in info.features),
        "tokens": info.num_tokens
        if info.num_tokens is not None
        else "as many as the encoder gives",
        "sites": info.num_sites,
        "resampler": f"{info.num_layers} layers, {info.num_heads} heads"
        if info.num_layers
        else "none",
        "parameters": f"{info.num_parameters:,}",
        "LoRA rank": info.lora_rank or "none",
        **generation_of(info),
        "dtype": info.dtype,
        **{
            f"metadata {one_line(name)}": one_line(value, MAX_VALUE)
            for name, value in info.metadata.items()
        },
    }
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
