"""Measure everything that ships with the embedded world, and write it where people read it.

    python benchmarks/diorama.py                      # all of it, about half an hour on two cores
    python benchmarks/diorama.py --only base shipped
    python benchmarks/diorama.py --only quickstart --adapter imprompt-quickstart/run/adapter.safetensors

Figures go to benchmarks/results/diorama.json; the first part of docs/results.md and the table of the README
are made from that file, and from nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pages import DOCS, README, RESULTS, header, put, row

from imprompt.bases.diorama import GUIDANCE_SCALE

FIGURES = RESULTS / "diorama.json"
PARTS = ("judge", "base", "quickstart", "shipped", "ablation", "picture")
QUICKSTART_ADAPTER = Path("imprompt-quickstart/run/adapter.safetensors")
COUNTS = {"judge": 5000, "base": 500, "quickstart": 120, "shipped": 240, "ablation": 120}
SAMPLING = {"steps": 25, "sampler": "dpm-solver++", "guidance_scale": None, "seed": 0}
NAMES = {"kind": "object", "colour": "colour", "style": "style", "setting": "setting"}


def measure(part: str, adapter: Path, output: Path) -> dict[str, float]:
    from imprompt.bases import load_base
    from imprompt.evaluation.measure import Sampling
    from imprompt.evaluation.run import Request, evaluate

    request = Request(
        adapter_file=adapter if part == "quickstart" else None,
        load=lambda: load_base("diorama"),
        count=COUNTS[part],
        output=output,
        sampling=Sampling(**SAMPLING),
    )
    return evaluate("adapter" if part in ("quickstart", "shipped") else part, request)


def percent(figures: dict[str, float], prefix: str = "", suffix: str = "") -> list[str]:
    """Shares of object, colour, style and setting, for a table."""
    return [f"{figures[f'{prefix}{name}{suffix}']:.1%}" for name in NAMES]


def main_table(results: dict[str, dict[str, float]]) -> str:
    kept = " kept, image alone"
    lines = header("right, of unseen cases", *NAMES.values())
    for part, name, suffix in (
        ("judge", f"the judge, on {COUNTS['judge']} renders", ""),
        ("base", f"the base, as {COUNTS['base']} captions ask", ""),
        ("quickstart", "quickstart's adapter, image alone, λ = 1", kept),
        ("shipped", "shipped adapter, image alone, λ = 1", kept),
    ):
        if part in results:
            lines += row(name, *percent(results[part], suffix=suffix))
    return lines


def together_table(figures: dict[str, float], by_preset: bool) -> str:
    prefix, by = "image and text, λ=", " by preset"
    scales = list(
        dict.fromkeys(
            key[len(prefix) :].split(":")[0]
            for key in figures
            if prefix in key and (by in key) == by_preset
        )
    )
    lines = header("λ", *(scale.split(by)[0] for scale in scales))
    for what in ("object of the text", "look of the image", "both"):
        lines += row(what, *(f"{figures[f'{prefix}{scale}: {what}']:.0%}" for scale in scales))
    return lines


def ablation_table(figures: dict[str, float]) -> str:
    lines = header("adapter", "trainable", *NAMES.values())
    for name in (
        "decoupled, trained",
        "concatenated, trained",
        "decoupled, untrained",
        "decoupled, fitted and trained",
    ):
        size = figures[f"{name.split(',')[0]}: parameters"]
        lines += row(name, f"{size:,.0f}", *percent(figures, f"{name}: "))
    return lines


def document(results: dict[str, dict[str, float]]) -> str:
    text = f"""Made by `python benchmarks/diorama.py`, which writes `benchmarks/results/diorama.json`.
Scenes come from seeds that no training sees; a classifier trained on renders (the judge) says what a
picture shows. Images are drawn with DPM-Solver++ in {SAMPLING["steps"]} steps at the base's own guidance, {GUIDANCE_SCALE:g}.

{main_table(results)}
```sh
imprompt evaluate --what judge --count {COUNTS["judge"]}
imprompt evaluate --what base --count {COUNTS["base"]} --steps 25 --sampler dpm-solver++
imprompt evaluate imprompt-quickstart/run/adapter.safetensors --count {COUNTS["quickstart"]} --steps 25 --sampler dpm-solver++
imprompt evaluate --count {COUNTS["shipped"]} --steps 25 --sampler dpm-solver++
```

"Image alone" is an empty text and an unseen picture as the prompt: the share of generated images in
which the attribute of that picture is found again.
"""
    if "shipped" in results:
        text += f"""
### Image and text together

The image gives style and colour, the text names another object ("a rocket"); {COUNTS["shipped"] // 2}
pairs per λ, shipped adapter. "Look" is style and colour at once, "both" is look and object at once.
The same λ at all sites:

{together_table(results["shipped"], by_preset=False)}
With `site_preset="style"`: λ in the last block, which draws colour and style, and a fifth of it elsewhere:

{together_table(results["shipped"], by_preset=True)}"""
    if "ablation" in results:
        text += f"""
### Decoupled or concatenated

The ablation of the paper (2308.06721, section 4.4.2): image tokens with keys and values of their own,
against image tokens appended to the text's and read by the frozen ones, with as many trainable
parameters. Same pairs, steps and settings (preset `diorama-image-prompt`); {COUNTS["ablation"]} unseen
image prompts, empty text, λ = 1. The last row is ours: its projection began as the least-squares fit to captions. The
paper's order was found after a million steps and need not hold after 800: here the table decides.

{ablation_table(results["ablation"])}
```sh
imprompt evaluate --what ablation --output runs/ablation --count {COUNTS["ablation"]} --steps 25 --sampler dpm-solver++
```
"""
    return text


def draw_variations(path: Path) -> None:
    """The README's picture: unseen image prompts, variations of them, and text beside them."""
    from imprompt import ImagePrompt, generate, load_adapter, load_base
    from imprompt.core.images import image_grid, pixels_to_images
    from imprompt.core.shipped import ADAPTERS, shipped
    from imprompt.diorama import render
    from imprompt.evaluation.measure import unseen_scenes

    base, adapter = load_base("diorama"), load_adapter(shipped(ADAPTERS["diorama"]))
    scenes = unseen_scenes(65, first=30_000)[::13]
    columns = {
        "a variation": ("", 1.0, 0),
        "another": ("", 1.0, 1),
        "a third": ("", 1.0, 2),
        "“as line art”": ("as line art", 0.5, 0),
        "“in neon light”": ("in neon light", 0.5, 0),
        "“in the snow”": ("in the snow", 0.5, 0),
    }
    cells, labels = [], []
    for pixels in render(scenes, base.image_size_px).pixels:
        cells += pixels_to_images(pixels[None])
        labels.append("image prompt")
        for label, (text, scale, seed) in columns.items():
            prompt = ImagePrompt(pixels, adapter=adapter, scale=scale)
            cells += generate(base, text, prompt, seed=seed, steps=50, progress=False)
            labels.append(label)
    large = [cell.resize((128, 128), 0) for cell in cells]
    image_grid(large, 1 + len(columns), labels).save(path)


def write_documents(results: dict[str, dict[str, float]]) -> None:
    put(DOCS / "results.md", "diorama", document(results))
    put(README, "figures", main_table(results))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--adapter", type=Path, default=QUICKSTART_ADAPTER)
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    arguments = parser.parse_args()
    results = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    for part in arguments.only:
        if part == "picture":
            draw_variations(DOCS / "images" / "variations.png")
            continue
        results[part] = measure(part, arguments.adapter, arguments.output)
        FIGURES.parent.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(part, json.dumps(results[part]), flush=True)
    write_documents(results)


if __name__ == "__main__":
    main()
