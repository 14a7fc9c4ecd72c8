"""Figures and picture of IP-Adapter-Instruct on the embedded world.

    python benchmarks/instruct.py measure                  each task, unseen lessons
    python benchmarks/instruct.py compare --output runs/instruct-table
                                                           joint model, single-task models, one instruction
    python benchmarks/instruct.py picture                  one image, told different things; persons
    python benchmarks/instruct.py map                      all instructions as points

Without --adapter it is the adapter that comes with the package. Figures go to
benchmarks/results/instruct.json, tables of them to docs/instruct.md, the pictures to
docs/images/instruct.png, instruct-faces.png and instructions.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pages import DOCS, RESULTS, header, publish, put, row
from PIL.Image import Image

FIGURES = RESULTS / "instruct.json"
SAMPLING = {"steps": 25, "sampler": "dpm-solver++", "guidance_scale": None, "seed": 0}
TASKS = ("everything", "style", "object", "composition", "face")
SHOWN = (
    "layout IoU",
    "kept: character, of 100",
    "kept: kind",
    "kept: colour",
    "kept: style",
    "kept: setting",
    "kept: all at once",
    "text: kind",
    "text: colour",
    "text: style",
    "text: setting",
    "text: all at once",
)
SCORES = ("CLIP-I", "CLIP-T", "CLIP-P", "CLIP-S")
JOINT, ONE = "joint", "one fixed instruction"
PROMPTS = (
    ("use everything", ""),
    ("use the style", "a blue car"),
    ("use the style", "a red castle"),
    ("use the {object}", "in the snow, in crayon"),
    ("use the {object}", "at night, in neon light"),
    ("use the composition", "a pink {kind}, as a watercolor"),
    ("use the composition", "a green {kind}, made of clay"),
)
SEEDS_SHOWN = (3, 10, 18, 31)
FACES_SHOWN = 8


def measure(adapter: Path | None, count: int) -> dict[str, float]:
    from imprompt.bases import load_base
    from imprompt.evaluation.measure import Sampling
    from imprompt.evaluation.run import Request, evaluate

    request = Request(
        adapter_file=adapter,
        load=partial(load_base, "diorama"),
        count=count,
        output=Path("runs"),
        sampling=Sampling(**SAMPLING),
    )
    return evaluate("instruct", request)


def draw_map() -> dict[str, float]:
    from imprompt.bases import load_base
    from imprompt.evaluation.instruction_map import map_instructions

    return map_instructions(load_base("diorama"), DOCS / "images")


def compare(
    output: Path, pairs: int, steps: int, count: int, words: Path | None
) -> dict[str, float]:
    from imprompt.bases import load_base
    from imprompt.evaluation.instruct_table import measure_instruct_table
    from imprompt.evaluation.judge import load_judge
    from imprompt.evaluation.measure import Sampling

    return measure_instruct_table(
        partial(load_base, "diorama"),
        load_judge(),
        Sampling(**SAMPLING),
        output,
        count,
        num_pairs=pairs,
        steps=steps,
        words=words,
    )


def task_table(figures: dict[str, float]) -> str:
    """Rows: what is kept or followed; columns: tasks."""
    lines = header("", *TASKS)
    for name in SHOWN:
        cells = [figures.get(f"{task}: {name}") for task in TASKS]
        lines += row(name, *("" if cell is None else f"{cell:.1%}" for cell in cells))
    for name in SCORES:
        lines += row(name, *(f"{figures[f'{task}: {name}']:.3f}" for task in TASKS))
    reached = figures["composition: layout IoU of true renders"]
    limits = f"True renders of what was to be drawn reach a layout IoU of {reached:.1%}"
    alone = figures.get("composition: layout IoU of the text alone")
    if alone is not None:
        limits += f"; the text alone, without an image, gives {alone:.1%}"
    return f"{lines}\n{limits}.\n"


def neighbours(figures: dict[str, float]) -> str:
    share = figures["nearest neighbour is of the same task"]
    return (
        f"{share:.1%} of the instructions have one of the same task as their nearest neighbour on the map "
        "(chance: 20%).\n"
    )


def comparison(figures: dict[str, float], shipped: dict[str, float]) -> str:
    """Per task: joint model, that task's own model, one instruction; what is kept and followed, scores.

    The last row of each is the adapter that comes with the package, as `measure` found it.
    """
    names = ("kept", "text", *SCORES)
    lines = header("task", "model", "kept", "followed", *SCORES)
    for task in TASKS:
        for label in (JOINT, f"{task} alone", ONE, f"{ONE}, asked in other words"):
            cells = [_summary(_of(figures, f"{task}, {label}: "), name) for name in names]
            lines += row(task, "its own" if label == f"{task} alone" else label, *cells)
        cells = [_summary(_of(shipped, f"{task}: "), name) for name in names]
        lines += row(task, "joint, as shipped", *cells)
    return lines


def _of(figures: dict[str, float], prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in figures.items() if k.startswith(prefix)}


def _summary(figures: dict[str, float], name: str) -> str:
    """Kept or followed: the mean share of the attributes it is about; a score as it is."""
    if name in SCORES:
        return f"{figures[name]:.3f}"
    shares = [v for k, v in figures.items() if k.startswith(f"{name}: ") and "all" not in k]
    if name == "kept" and "layout IoU" in figures:
        shares = [figures["layout IoU"]]
    return f"{sum(shares) / len(shares):.1%}" if shares else ""


def draw_picture(adapter_file: Path | None, path: Path) -> None:
    """Rows: one image each; columns: what it is told."""
    from imprompt.core.images import pixels_to_images
    from imprompt.data.instructions import filled
    from imprompt.diorama import render
    from imprompt.evaluation.measure import unseen_scenes

    draw = drawer(adapter_file)
    scenes = [unseen_scenes(1 + number, first=40_000)[number] for number in SEEDS_SHOWN]
    cells, labels = [], []
    for scene, picture in zip(scenes, pixels_to_images(render(scenes).pixels), strict=True):
        cells.append(picture)
        labels.append("image prompt")
        for instruction, text in PROMPTS:
            told, asked = filled(instruction, scene.kind), text.replace("{kind}", scene.kind)
            cells.append(draw(picture, told, asked))
            about = told.removeprefix("use ").removeprefix("the ")
            labels.append(f"{about}: {asked or 'no text'}")
    save_grid(cells, 1 + len(PROMPTS), labels, path)


def draw_faces(adapter_file: Path | None, path: Path) -> None:
    """Above, persons whom no training saw; below, what is drawn when their face shall be taken."""
    from imprompt.core.images import pixels_to_images
    from imprompt.diorama import render
    from imprompt.evaluation.instruct import unseen_lessons

    draw = drawer(adapter_file)
    lessons = unseen_lessons("face", FACES_SHOWN)
    pictures = pixels_to_images(render([lesson.condition for lesson in lessons]).pixels)
    drawn = [
        draw(picture, lesson.instruction, lesson.prompt)
        for picture, lesson in zip(pictures, lessons, strict=True)
    ]
    labels = [f"face: {lesson.prompt.removeprefix('a person in ')}" for lesson in lessons]
    save_grid(pictures + drawn, FACES_SHOWN, ["image prompt"] * FACES_SHOWN + labels, path)


def drawer(adapter_file: Path | None) -> Callable[[Image, str, str], Image]:
    """Draws a picture of an image prompt, an instruction and a text."""
    from imprompt import ImagePrompt, generate, load_adapter, load_base
    from imprompt.core.shipped import ADAPTERS, shipped

    base = load_base("diorama")
    adapter = load_adapter(adapter_file or shipped(ADAPTERS["diorama-instruct"]))

    def draw(picture: Image, told: str, asked: str) -> Image:
        return generate(
            base,
            asked,
            image_prompts=ImagePrompt(picture, adapter=adapter, instruction=told),
            steps=SAMPLING["steps"],
            sampler=SAMPLING["sampler"],
            guidance_scale=SAMPLING["guidance_scale"],
            seed=1,
        )[0]

    return draw


def save_grid(cells: list[Image], columns: int, labels: list[str], path: Path) -> None:
    from imprompt.core.images import image_grid

    image_grid([cell.resize((256, 256), 0) for cell in cells], columns, labels).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "compare", "picture", "map", "tables"))
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=5000, help="lessons that compare trains on")
    parser.add_argument("--steps", type=int, default=300, help="steps of each model of compare")
    parser.add_argument("--words", type=Path, help="first stage for compare, trained already")
    parser.add_argument("--output", type=Path, default=Path("runs/instruct-table"))
    arguments = parser.parse_args()
    if arguments.what == "picture":
        draw_picture(arguments.adapter, DOCS / "images" / "instruct.png")
        draw_faces(arguments.adapter, DOCS / "images" / "instruct-faces.png")
        return
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    if arguments.what == "measure":
        figures["instruct"] = measure(arguments.adapter, arguments.count)
    elif arguments.what == "map":
        figures["instructions"] = draw_map()
    elif arguments.what == "compare":
        figures["instruct-table"] = compare(
            arguments.output,
            arguments.pairs,
            arguments.steps,
            arguments.count,
            arguments.words,
        )
    if arguments.what != "tables":
        FIGURES.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    page = DOCS / "instruct.md"
    if "instruct" in figures:
        publish(page, "tasks", task_table(figures["instruct"]))
    if "instructions" in figures:
        put(page, "map", neighbours(figures["instructions"]))
    if "instruct-table" in figures:
        publish(page, "comparison", comparison(figures["instruct-table"], figures["instruct"]))


if __name__ == "__main__":
    main()
