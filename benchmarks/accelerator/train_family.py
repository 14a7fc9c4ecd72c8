"""Train what stands on the embedded base: Instruct, identity, a ControlNet and a T2I-Adapter.

    python benchmarks/accelerator/train_family.py runs/family            # all four, then measure
    python benchmarks/accelerator/train_family.py runs/family --parts instruct --factor 4
    python benchmarks/accelerator/train_family.py runs/family --base runs/base/weights/diorama-base

The same command resumes. `OUT/weights` in the end has them as they lie in `src/imprompt/weights`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from imprompt.bases import load_base
from imprompt.checkpoints import load_adapter, save_adapter
from imprompt.core.config import read_toml
from imprompt.data.columns import default_columns
from imprompt.data.dataset import Columns
from imprompt.data.prepare import prepare
from imprompt.evaluation.instruct_table import rows_of_task
from imprompt.evaluation.measure import Sampling
from imprompt.evaluation.run import Request, evaluate
from imprompt.training.run import preset_path, run_training

PARTS = ("instruct", "identity", "controlnet-segmentation", "t2i-depth")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def trained(
    system: str,
    preset: str,
    data: Path | Sequence[Path],
    arguments: argparse.Namespace,
    name: str,
    *settings: str,
) -> Path:
    """The file or folder that a run of the product's own command exports."""
    steps = read_toml(preset_path(preset, system))["train"]["steps"]
    return run_training(
        system,
        data=data,
        base=load_base(arguments.base, device=DEVICE),
        output=arguments.output / name,
        preset=preset,
        settings=[f"train.steps={max(1, int(steps * arguments.factor))}", *settings],
    )


def prepared(source: str, folder: str, arguments: argparse.Namespace, **wanted) -> Path:
    """Encoded pairs of the embedded world."""
    base = load_base(arguments.base, device=DEVICE)
    return prepare(source, arguments.output / folder, base, batch_size=250, **wanted)


def instruct(arguments: argparse.Namespace, weights: Path) -> None:
    """Layouts, all words, the denoiser; then who is seen, and the denoiser again, last with what it draws by
    itself; shipped in half precision."""
    count = arguments.num_lessons
    columns = (*default_columns("instruct-words"), "id_embeds")
    data = prepared(f"diorama-instruct:{count}", "lessons", arguments, columns=columns)
    faces = prepared(
        f"diorama-instruct/face:{count // 4}:{count}", "face-lessons", arguments, columns=columns
    )
    some = rows_of_task(Columns.open(data), "composition", arguments.output / "compositions")
    made = trained("instruct-words", "diorama-instruct-layouts", some, arguments, "layouts")
    lora = ("system.lora_rank=32", "system.likeness=0.8")
    for system, preset, more, name, settings in (
        ("instruct-words", "diorama-instruct-words", data, "words", ()),
        ("instruct", "diorama-instruct", data, "joint", ()),
        ("instruct-faces", "diorama-instruct-faces", (faces, faces, data), "faces", ()),
        ("instruct", "diorama-instruct", (faces, data), "all", lora),
        ("instruct", "diorama-instruct-drawn", (faces, data), "drawn", ()),
    ):
        start = f'system.start_from="{made}"'
        made = trained(system, preset, more, arguments, name, start, *settings)
    adapter = load_adapter(made)
    file = weights / "diorama-ip-adapter-instruct.safetensors"
    save_adapter(adapter, file, adapter.metadata, dtype=torch.float16)


def identity(arguments: argparse.Namespace, weights: Path) -> None:
    """On portraits of many more characters than a CPU has time for."""
    people = f"diorama-people:{arguments.num_portraits}"
    data = prepared(people, "people", arguments, variant="identity")
    made = trained("identity", "diorama-identity", data, arguments, "identity")
    shutil.copytree(made, weights / "diorama-identity", dirs_exist_ok=True)


def control(part: str, arguments: argparse.Namespace, weights: Path) -> None:
    """A ControlNet or a T2I-Adapter for one kind of map."""
    system, kind = {"controlnet": "controlnet", "t2i": "t2i-adapter"}, part.split("-")[1]
    columns = ("latent_mean", "latent_logvar", "text_ids", f"control_{kind}")
    data = prepared(f"diorama:{arguments.num_scenes}", "scenes", arguments, columns=columns)
    name = system[part.split("-")[0]]
    made = trained(name, f"diorama-{name}", data, arguments, part, f"system.kind={kind}")
    shutil.copytree(made, weights / f"diorama-{part}", dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train what stands on the embedded base.")
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--base", default="diorama", help="folder (default: the one that is shipped)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--factor", type=float, default=1.0, help="times the presets' steps")
    parser.add_argument("--num-lessons", type=int, default=30_000)
    parser.add_argument("--num-portraits", type=int, default=16_384)
    parser.add_argument("--num-scenes", type=int, default=16_384)
    parser.add_argument("--count", type=int, default=48, help="unseen cases to measure with")
    arguments = parser.parse_args()
    weights = arguments.output / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        if part == "instruct":
            instruct(arguments, weights)
        elif part == "identity":
            identity(arguments, weights)
        else:
            control(part, arguments, weights)
    figures = {
        part: evaluate(
            part,
            Request(
                adapter_file=weights / made,
                load=lambda: load_base(arguments.base, device=DEVICE),
                count=arguments.count,
                output=arguments.output,
                sampling=Sampling(steps=25, sampler="dpm-solver++", guidance_scale=guidance_scale),
            ),
        )
        for part, made, guidance_scale in (
            ("instruct", "diorama-ip-adapter-instruct.safetensors", None),
            ("identity", "diorama-identity", 2.0),
        )
        if part in arguments.parts
    }
    (arguments.output / "figures.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
