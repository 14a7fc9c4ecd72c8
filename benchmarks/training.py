"""Training an image-prompt adapter: this project with cached features, on the fly, and the authors' recipe.

    python benchmarks/training.py --quick                # small networks, under a minute
    python benchmarks/training.py --size-px 256          # Stable Diffusion 1.5's size, on a CPU
    python benchmarks/training.py --size-px 512 --batch 8 --steps 20 --device cuda

All have networks of the same sizes (random weights: what they are changes no figure), the same batch and
the same precision of arithmetic, and read the same image files. Each runs in a process of its own, in
turns, so that its peak memory is its own. `ours` is the product's own training loop. On a CPU time is the
process's own (others may want the machine too), and memory is what the process held at most; on a GPU it is
the clock's, and what torch had allocated.

Results are added to benchmarks/results/training-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

RESULTS = Path(__file__).parent / "results"
CONTENDERS = ("recipe", "on the fly", "cached")
NUM_FILES = 64
SD15 = {
    "unet": {"cross_attention_dim": 768},
    "vae": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
    },
    "text": {"hidden_size": 768, "intermediate_size": 3072, "heads": 12, "layers": 12},
    "vision": {  # OpenCLIP ViT-H/14
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 1024,
    },
}
SMALL = {
    "unet": {
        "cross_attention_dim": 64,
        "block_out_channels": [64, 128, 128, 128],
        "layers_per_block": 1,
    },
    "vae": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [16, 32, 32, 32],
        "norm_num_groups": 8,
        "layers_per_block": 1,
    },
    "text": {"hidden_size": 64, "intermediate_size": 128, "heads": 2, "layers": 2},
    "vision": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
        "projection_dim": 64,
    },
}
MAX_TOKENS = 77


def build_networks(
    sizes: dict[str, Any], frozen: torch.dtype, unet: torch.dtype, unused: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The networks with weights that cost no time to draw: one random block, repeated.

    Those of `unused` have shapes only.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    text = sizes["text"]
    text_config = CLIPTextConfig(
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_attention_heads=text["heads"],
        num_hidden_layers=text["layers"],
        max_position_embeddings=MAX_TOKENS,
    )
    makers: dict[str, Any] = {
        "unet": lambda: UNet2DConditionModel(sample_size=64, **sizes["unet"]),
        "vae": lambda: AutoencoderKL(latent_channels=4, **sizes["vae"]),
        "text_encoder": lambda: CLIPTextModel(text_config),
        "image_encoder": lambda: CLIPVisionModelWithProjection(
            CLIPVisionConfig(hidden_act="gelu", **sizes["vision"])
        ),
    }
    networks = {}
    for name, make in makers.items():
        with torch.device("meta"):
            network = make()
        network.to(unet if name == "unet" else frozen)
        if name not in unused:
            network.to_empty(device="cpu")
            _fill(network)
        networks[name] = network.eval().requires_grad_(False)
    return networks


@torch.no_grad()
def _fill(network: torch.nn.Module) -> None:
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for name, weight in network.named_parameters():
        if weight.ndim < 2:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        flat, scale = weight.view(-1), weight[0].numel() ** -0.5
        for start in range(0, len(flat), len(noise)):
            piece = flat[start : start + len(noise)]
            piece.copy_(noise[: len(piece)] * scale)
    for name, buffer in network.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


def tokenizer(texts: Any, **_: Any) -> Any:
    """Stands for CLIP's, whose files are not at hand; its work is nothing beside a step's."""
    one = isinstance(texts, str)
    ids = [
        [49406, *(hash(w) % 40000 for w in t.split())][: MAX_TOKENS - 1]
        for t in ([texts] if one else texts)
    ]
    padded = torch.tensor([row + [49407] * (MAX_TOKENS - len(row)) for row in ids])
    return padded[0] if one else argparse.Namespace(input_ids=padded)


def write_files(folder: Path, size_px: int) -> list[Path]:
    """JPEG files somewhat larger than what is trained on, and captions."""
    files = []
    for number in range(NUM_FILES):
        draw = np.random.default_rng(number)
        small = draw.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((size_px * 4 // 3, size_px), Image.Resampling.BICUBIC)
        files.append(folder / f"{number}.jpg")
        image.save(files[-1], quality=90)
        files[-1].with_suffix(".txt").write_text(f"a picture that has the number {number}")
    return files


def run_contender(name: str, arguments: argparse.Namespace, files_folder: Path) -> dict[str, float]:
    """Train for a few steps in this process and say how long a step took."""
    device = torch.device(arguments.device)
    half = getattr(torch, arguments.precision)
    sizes = SMALL if arguments.quick else SD15
    is_recipe = name == "recipe"
    unused = ("vae", "image_encoder") if name == "cached" else ()
    networks = build_networks(sizes, half, torch.float32 if is_recipe else half, unused)
    moments = (
        _recipe(networks, arguments, files_folder, half)
        if is_recipe
        else _ours(name, networks, arguments, files_folder, half)
    )
    # The first interval holds what is done once.
    seconds = [later - earlier for earlier, later in pairwise(moments[1:])]
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {"seconds": median(seconds), "peak_gb": peak / 1e9, "intervals": len(seconds)}


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _recipe(
    networks: dict[str, Any], arguments: argparse.Namespace, folder: Path, half: torch.dtype
) -> list[float]:
    from diffusers import DDPMScheduler
    from training_recipe import steps

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    running = steps(
        networks,
        scheduler,
        sorted(folder.glob("*.jpg")),
        tokenizer,
        size_px=arguments.size_px,
        batch_size=arguments.batch,
        half=half,
        workers=4 if arguments.device == "cuda" else 0,
    )
    moments = []
    for _ in range(arguments.steps + 2):
        next(running)
        moments.append(_clock(arguments.device))
    return moments


def _ours(
    name: str,
    networks: dict[str, Any],
    arguments: argparse.Namespace,
    folder: Path,
    half: torch.dtype,
) -> list[float]:
    from diffusers import DDIMScheduler

    from imprompt.bases.clip_vision import ClipImageEncoder
    from imprompt.bases.stable_diffusion import StableDiffusionBase
    from imprompt.data.dataset import Columns
    from imprompt.data.on_the_fly import PairsOnTheFly
    from imprompt.systems.image_prompt import ImagePromptOptions, build
    from imprompt.training.config import TrainConfig
    from imprompt.training.loop import train

    base: Any = StableDiffusionBase(
        name="benchmark",
        unet=networks["unet"],
        vae=networks["vae"],
        text_encoder=networks["text_encoder"],
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        image_encoder=ClipImageEncoder(networks["image_encoder"]),
    )
    base.fingerprint = lambda: "benchmark"
    for network in networks.values():
        if not next(network.parameters()).is_meta:
            network.to(arguments.device)
    if name == "cached":
        data: Any = Columns.open(
            _random_columns(Path(folder.parent) / "data", base, arguments.size_px)
        )
    else:
        data = PairsOnTheFly(str(folder), base, size_px=arguments.size_px)
    system = build(ImagePromptOptions(), base, data)
    moments: list[float] = []
    loss = system.loss

    def timed(batch: Any, randomness: Any) -> Any:
        moments.append(_clock(arguments.device))
        return loss(batch, randomness)

    system.loss = timed  # type: ignore[method-assign]
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    config = TrainConfig(
        steps=arguments.steps + 2,
        batch_size=arguments.batch,
        precision=arguments.precision,
        frozen_precision=arguments.precision,
        gradient_checkpointing=arguments.checkpointing,
        compile_blocks=arguments.compile,
        validation_rows=0,
        checkpoint_every_steps=10_000,
        report_to="none",
    )
    with tempfile.TemporaryDirectory() as output:
        train(system, data, config, Path(output) / "run", export_name="adapter.safetensors")
    return moments


def _random_columns(folder: Path, base: Any, size_px: int) -> Path:
    """What `imprompt prepare` would write, without the wait."""
    from imprompt.data.dataset import ColumnsWriter

    folder.mkdir(exist_ok=True)
    writer, size = ColumnsWriter(folder), size_px // 8
    writer.write(
        0,
        {
            "latent_mean": torch.randn(NUM_FILES, 4, size, size).half(),
            "latent_logvar": torch.full((NUM_FILES, 4, size, size), -5.0).half(),
            "image_embeds": torch.randn(NUM_FILES, base.image_encoder.embed_dim).half(),
            "text_ids": base.tokenize([f"a picture {i}" for i in range(NUM_FILES)]),
        },
    )
    writer.finish(NUM_FILES, {"encoders_fingerprint": base.encoders_fingerprint()})
    return folder


def run_apart(name: str, arguments: list[str], folder: Path) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--contender", name, "--files", str(folder)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="small networks")
    parser.add_argument("--size-px", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="timed steps in each round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="bfloat16", help="of arithmetic")
    parser.add_argument("--checkpointing", action="store_true", help="ours: activations twice")
    parser.add_argument("--compile", action="store_true", help="ours: compiled blocks")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(run_contender(arguments.contender, arguments, arguments.files)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "files"
        folder.mkdir()
        write_files(folder, arguments.size_px)
        for number in range(arguments.rounds):
            for name in CONTENDERS:
                found[name].append(run_apart(name, sys.argv[1:], folder))
                figures = found[name][-1]
                print(
                    f"round {number}, {name}: {figures['seconds']:.3f} s per step, "
                    f"{figures['peak_gb']:.2f} GB",
                    flush=True,
                )
    entry: dict[str, Any] = {
        "networks": "small" if arguments.quick else "Stable Diffusion 1.5, ViT-H/14",
        "size_px": arguments.size_px,
        "batch": arguments.batch,
        "precision": arguments.precision,
        "checkpointing": arguments.checkpointing,
        "compile": arguments.compile,
        "rounds": arguments.rounds,
        "steps_per_round": arguments.steps,
        "machine": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    recipe = found["recipe"]
    for name, rounds in found.items():
        ratios = [
            theirs["seconds"] / ours["seconds"] for theirs, ours in zip(recipe, rounds, strict=True)
        ]
        entry[name] = {
            "samples_per_second": arguments.batch / median(r["seconds"] for r in rounds),
            "peak_gb": max(r["peak_gb"] for r in rounds),
            "speed_against_recipe": median(ratios),
            "speed_against_recipe_rounds": ratios,
        }
        print(
            f"{name}: {entry[name]['samples_per_second']:.4g} samples/s "
            f"({entry[name]['speed_against_recipe']:.2f}×), {entry[name]['peak_gb']:.2f} GB"
        )
    add(RESULTS / f"training-{arguments.device}.json", entry)


def add(path: Path, entry: dict[str, Any]) -> None:
    """Put an entry in the place of the one with the same settings, or after the others."""
    entries = json.loads(path.read_text()) if path.exists() else []
    same = ("networks", "size_px", "batch", "precision", "checkpointing", "compile", "machine")
    entries = [e for e in entries if any(e[key] != entry[key] for key in same)]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([*entries, entry], indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
