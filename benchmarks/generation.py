"""What an image prompt costs: the bare UNet, this project, and diffusers' IP-Adapter, side by side.

    python benchmarks/generation.py --quick            # a minute or two on two cores
    python benchmarks/generation.py --latents 32       # the size of Stable Diffusion 1.5, on a CPU
    python benchmarks/generation.py --compiled --size diorama --latents 16
    python benchmarks/generation.py --device cuda      # whole generations of 50 steps as well

All three have the same random weights (what they are changes no figure), the same tokens and, as is
checked, the same output. Two kinds of figures come of it:

- work: floating-point operations and kernels of a step, counted without computing anything. These do
  not depend on the machine, nor on who else uses it.
- time (on a CPU that of this process): medians over rounds in each of which all three take turns. Of `sites`, the attention layers
  where image prompts enter; of `projection`, features to tokens; of a whole step; of a generation.

Results are added to benchmarks/results/generation-DEVICE.json case by case, so that a later run with
other arguments completes the file. `table` makes the README's table of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from generation_contenders import SIZES, Case, Contenders, build_unet
from generation_work import work_of
from pages import README, put

RESULTS = Path(__file__).parent / "results"
HIDDEN = ("1 image, masks", "2 images, masks", "3 images, masks")
SIZE_NAMES = {"sd15": "Stable Diffusion 1.5", "diorama": "diorama", "narrow": "narrow"}


def cases_of(variants: list[str], numbers: list[int], quick: bool) -> list[Case]:
    """The most telling first: a run may end before the last."""
    cases = [Case(variant, 1) for variant in variants]
    for number in numbers:
        for variant in variants:
            cases.append(Case(variant, number))
            cases.append(Case(variant, number, masked=True))
    cases += [Case(variant, 1, scale=0.0) for variant in variants]
    if quick:
        cases = cases[: len(variants)]
    return list(dict.fromkeys(cases))


def interleaved(
    functions: dict[str, Any], rounds: int, device: torch.device, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of a call of each function, per round. Who goes first changes with every round."""
    # On a CPU the time that this process had it: others may want it too.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        functions[name]()
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize(device)
            start = clock()
            for _ in range(calls):
                functions[name]()
            synchronize(device)
            seconds[name].append((clock() - start) / calls)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Milliseconds of each, and the median over rounds of each one's ratio to the bare UNet."""
    result: dict[str, Any] = {
        name: {"ms": round(median(values) * 1e3, 4)} for name, values in seconds.items()
    }
    for name in seconds.keys() - {"bare"}:
        if "bare" in seconds:
            pairs = zip(seconds[name], seconds["bare"], strict=True)
            result[name]["ratio"] = round(median(own / bare for own, bare in pairs), 5)
    return result


@torch.inference_mode()
def time_case(case: Case, unet: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of one case, and how far the outputs of this project and diffusers are apart."""
    device = torch.device(arguments.device)
    rounds = arguments.rounds
    contenders = Contenders(unet, case, arguments.latents, arguments.batch, arguments.compiled)
    figures: dict[str, Any] = {"rounds": rounds, "difference": contenders.differences()}

    few = 1 if device.type == "cpu" else 10
    steps = interleaved(contenders.steps(), rounds, device, few)
    figures["step"] = summary(steps)
    if not arguments.compiled:
        figures["sites"] = summary(interleaved(contenders.sites(), 3 * rounds, device, few))
        figures["projection"] = summary(interleaved(contenders.once(), rounds, device))
        figures["isolated"] = isolated(figures, arguments.steps)
    if arguments.generations:
        generations = contenders.generations(arguments.steps)
        figures["generation"] = summary(interleaved(generations, arguments.generations, device))
        figures["generation"]["steps"] = arguments.steps
    return figures


def isolated(figures: dict[str, Any], num_steps: int) -> dict[str, float]:
    """Overhead over the bare step, of what was timed apart from it: sites and projection."""
    bare, sites, once = figures["step"]["bare"]["ms"], figures["sites"], figures["projection"]
    ours = sites["imprompt"]["ms"] - sites["bare"]["ms"] + once["imprompt"]["ms"] / num_steps
    theirs = sites["diffusers"]["ms"] - sites["bare"]["ms"] + once["diffusers"]["ms"]
    return {"imprompt": round(1 + ours / bare, 5), "diffusers": round(1 + theirs / bare, 5)}


def described(case: Case, **settings: Any) -> dict[str, Any]:
    return {"case": {"variant": case.variant, "prompts": case.prompts, **settings}}


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else platform.processor() or "CPU"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "load": None if is_gpu else round(os.getloadavg()[0], 1),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def add(path: Path, kind: str, entry: dict[str, Any]) -> None:
    """Put an entry into the file, in place of the one of the same case."""
    results = read(path)
    same = entry["case"]
    results[kind] = [old for old in results.get(kind, []) if old["case"] != same] + [entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def table(path: Path | str) -> str:
    """Markdown of a results file, for the README: a table per kind of figure and place.

    Masks for fewer than four images are left to the file.
    """
    results = {
        kind: [entry for entry in entries if entry["case"]["prompts"] not in HIDDEN]
        for kind, entries in read(Path(path)).items()
    }
    parts: list[str] = []
    if work := results.get("work"):
        title = f"Floating-point operations per step of {work[0]['num_steps']}, bare UNet = 1"
        parts.append(pivot(title, work, lambda entry, who: f"{entry[who]['ratio']:.4f}"))
        title = f"Kernels launched per step, bare UNet: {work[0]['bare']['kernels']}"
        parts.append(pivot(title, work, lambda entry, who: str(entry[who]["kernels"])))
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in results.get("time", []):
        case = entry["case"]
        where = f"{SIZE_NAMES[case['size']]}, {case['latents']} × {case['latents']} latents, batch "
        where += f"{case['batch']}, {entry['dtype']}, {'compiled' if case['compiled'] else 'eager'}"
        groups.setdefault(f"{where}, {entry['device']}", []).append(entry)
    for where, entries in groups.items():
        bare = median(entry["step"]["bare"]["ms"] for entry in entries)
        title = f"Time per step, bare UNet = 1 ({bare:.3g} ms; {where})"
        parts.append(pivot(title, entries, lambda entry, who: f"{entry['step'][who]['ratio']:.2f}"))
        apart = [entry for entry in entries if "isolated" in entry]
        title = f"The same from sites and projection timed alone ({where})"
        parts.append(pivot(title, apart, lambda entry, who: f"{entry['isolated'][who]:.3f}"))
        whole = [entry for entry in entries if "generation" in entry]
        title = f"Time of whole generations, bare UNet = 1 ({where})"
        parts.append(
            pivot(title, whole, lambda entry, who: f"{entry['generation'][who]['ratio']:.3f}")
        )
    return "\n".join(part for part in parts if part)


def write_readme(path: Path) -> None:
    """Put the tables of counted work between the marks in the README."""
    work, kernels, *_ = table(path).split("\n\n")
    put(README, "costs", f"{work}\n\n{kernels}\n")


def pivot(
    title: str, entries: list[dict[str, Any]], show: Callable[[dict[str, Any], str], str]
) -> str:
    """Rows: who, with which variant. Columns: what they were shown."""
    if not entries:
        return ""
    cells = {(e["case"]["variant"], e["case"]["prompts"]): e for e in entries}
    variants = list(dict.fromkeys(variant for variant, _ in cells))
    columns = sorted({prompts for _, prompts in cells}, key=lambda name: ("λ" in name, name))
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for variant in variants:
        for who in ("imprompt", "diffusers"):
            shown = (
                show(cells[variant, name], who) if (variant, name) in cells else ""
                for name in columns
            )
            lines.append(f"| {variant}, {who} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What an image prompt costs, side by side.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 on a GPU by default")
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument("--latents", type=int, default=64, help="side of the latents")
    parser.add_argument("--batch", type=int, default=2, help="2: one image with guidance")
    parser.add_argument("--variants", nargs="+", default=["base", "plus", "full"])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--cases", nargs="+", help='of these only, as "4 images, masks"')
    parser.add_argument("--compiled", action="store_true", help="torch.compile, time only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="of a generation")
    parser.add_argument("--generations", type=int, help="rounds of whole ones: on a CPU none")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after")
    parser.add_argument("--only", choices=["work", "time"])
    parser.add_argument("--quick", action="store_true", help="one image, 16×16, few rounds")
    parser.add_argument("--output", type=Path)
    parsed = parser.parse_args(arguments)
    kind = torch.device(parsed.device).type
    if parsed.quick:
        parsed.latents, parsed.rounds = min(parsed.latents, 16), min(parsed.rounds, 3)
    if parsed.generations is None:
        parsed.generations = 3 if kind == "cuda" else 0
    if parsed.dtype is None:
        parsed.dtype = "bfloat16" if kind == "cuda" else "float32"
    if parsed.output is None:
        parsed.output = RESULTS / f"generation-{kind}{'-quick' if parsed.quick else ''}.json"
    return parsed


def main() -> None:
    arguments = parse()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    diffusers.logging.set_verbosity_error()
    deadline = time.monotonic() + arguments.seconds
    cases = cases_of(arguments.variants, arguments.images, arguments.quick)
    if arguments.cases:
        cases = [case for case in cases if case.prompts in arguments.cases]
    if arguments.only != "time" and not arguments.compiled:
        for case in cases:
            # Always of the full size, which costs nothing here.
            entry = described(case, batch=arguments.batch, latents=64)
            entry |= work_of(case, arguments.batch, latents=64, num_steps=arguments.steps)
            add(arguments.output, "work", entry)
            print(f"{case}: {entry['imprompt']['ratio']} / {entry['diffusers']['ratio']}")
    if arguments.only != "work":
        device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
        torch.manual_seed(0)
        unet = build_unet(arguments.size).to(device=device, dtype=dtype)
        for case in cases:
            if time.monotonic() > deadline:
                print("out of time")
                break
            names = ("size", "latents", "batch", "compiled")
            entry = described(case, **{name: getattr(arguments, name) for name in names})
            entry |= environment(device, dtype) | time_case(case, unet, arguments)
            add(arguments.output, "time", entry)
            print(f"{case}: {json.dumps(entry['step'])}", flush=True)
    text = table(arguments.output)
    arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    if arguments.output == RESULTS / "generation-cpu.json":
        write_readme(arguments.output)


if __name__ == "__main__":
    main()
