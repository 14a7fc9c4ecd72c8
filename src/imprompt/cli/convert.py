"""`imprompt convert`: an adapter from one file format to another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imprompt.cli.verb import add_verb
from imprompt.core.errors import ImpromptError

if TYPE_CHECKING:
    from imprompt.checkpoints import AdapterInfo

DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("native", "official", "diffusers")


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "convert",
        run,
        about="write an adapter in another format, or take it out of a training state",
        examples="  imprompt convert ip-adapter_sd15.bin ip-adapter_sd15.safetensors\n"
        "  imprompt convert checkpoint-50000/ adapter.safetensors      an accelerate state\n"
        "  imprompt convert adapter.safetensors unet.safetensors --layout diffusers\n"
        "  imprompt convert adapter.safetensors half.safetensors --dtype float16",
    )
    parser.add_argument(
        "file", type=Path, help=".safetensors or .bin of any layout, or a training state's folder"
    )
    parser.add_argument("output", type=Path, help="file to write, .safetensors")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="native",
        help="native (default): the official keys, and what the file is; official: the same keys "
        "alone; diffusers: keys of a UNet's state dict with the adapter loaded",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    parser.add_argument(
        "--base", help="for --layout diffusers: the base, if it is not Stable Diffusion 1, 2 or XL"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from imprompt.checkpoints import inspect, load_adapter, save_adapter

    if arguments.base and arguments.layout != "diffusers":
        raise ImpromptError("--base belongs to --layout diffusers: the others need none.")
    # Before anything is read; the folder is made only when there is something to put into it.
    if arguments.output.exists() and not arguments.overwrite:
        raise ImpromptError(f"{arguments.output} exists; choose another name or add --overwrite.")
    read = inspect(arguments.file)
    adapter = load_adapter(arguments.file, dtype=None)
    site_names = cross_attention_names(arguments.base) if arguments.base else None
    save_adapter(
        adapter,
        arguments.output,
        layout=arguments.layout,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        site_names=site_names,
    )
    print(f"read   {summary(read)}")
    print(f"wrote  {summary(inspect(arguments.output))}")


def cross_attention_names(base_name: str) -> Sequence[str]:
    from imprompt.adapters.sites import attention_sites
    from imprompt.bases import load_base

    unet = load_base(base_name).unet
    return [site.name for site in attention_sites(unet) if site.is_cross]


def summary(info: AdapterInfo) -> str:
    """One line of what a file is."""
    return (
        f"{info.path}: {info.layout}, {info.variant} for {info.base_family}, "
        f"{info.num_sites} sites, {info.num_parameters:,} parameters, {info.dtype}, "
        f"{info.size_bytes / 1e6:.1f} MB"
    )
