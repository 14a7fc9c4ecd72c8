"""The instructions as points: near each other where the text encoder takes them for alike.

Source: IP-Adapter-Instruct (2408.03209), figure 4: t-SNE of the instructions' embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw

from imprompt.bases import Base
from imprompt.core.errors import ImpromptError
from imprompt.data.instructions import TASKS, filled, instructions
from imprompt.diorama import OBJECT_KINDS
from imprompt.encoders.instruction import instruction_states

SIDE_PX, MARGIN_PX, RADIUS_PX = 640, 40, 4
COLOURS = ((200, 60, 50), (240, 150, 40), (60, 150, 80), (60, 110, 200), (140, 80, 170))


def all_instructions(folder: Path | None = None) -> tuple[list[str], list[int]]:
    """Every instruction that comes with the package and in a user's folder, objects' with kinds in turn; and
    its task's number."""
    texts: list[str] = []
    numbers: list[int] = []
    for number, task in enumerate(TASKS):
        for i, line in enumerate(instructions(task, folder)):
            texts.append(filled(line, OBJECT_KINDS[i % len(OBJECT_KINDS)]))
            numbers.append(number)
    return texts, numbers


@torch.no_grad()
def instruction_points(base: Base, texts: Sequence[str], seed: int = 0) -> Float[np.ndarray, "n 2"]:
    """Places in the plane, by t-SNE of the pooled states.

    Raises:
        ImpromptError: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImpromptError(
            "A map of instructions needs scikit-learn: pip install 'imprompt[plots]'."
        ) from error
    states = instruction_states(base, texts, "pooled")[:, 0].float().cpu().numpy()
    return TSNE(init="pca", perplexity=min(30, len(texts) // 4), random_state=seed).fit_transform(
        states
    )


def nearest_share(points: Float[np.ndarray, "n dim"], tasks: Sequence[int]) -> float:
    """The share of instructions whose nearest neighbour is of the same task."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    numbers = np.asarray(tasks)
    return float((numbers[distances.argmin(1)] == numbers).mean())


def draw_points(points: Float[np.ndarray, "n 2"], tasks: Sequence[int]) -> Image.Image:
    """The points in their tasks' colours, with a legend."""
    low, high = points.min(0), points.max(0)
    places = (points - low) / (high - low).max() * (SIDE_PX - 2 * MARGIN_PX) + MARGIN_PX
    image = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
    canvas = ImageDraw.Draw(image)
    for (x, y), task in zip(places.tolist(), tasks, strict=True):
        box = (x - RADIUS_PX, y - RADIUS_PX, x + RADIUS_PX, y + RADIUS_PX)
        canvas.ellipse(box, fill=COLOURS[task])
    for number, (task, colour) in enumerate(zip(TASKS, COLOURS, strict=True)):
        top = 8 + 16 * number
        canvas.ellipse((8, top, 16, top + 8), fill=colour)
        canvas.text((22, top - 2), task, fill="black")
    return image


def map_instructions(base: Base, output: Path, folder: Path | None = None) -> dict[str, float]:
    """Write `output / "instructions.png"`, and say how well the tasks stand apart.

    Raises:
        ImpromptError: scikit-learn is not installed, or the user's instructions cannot be used.
    """
    texts, tasks = all_instructions(folder)
    points = instruction_points(base, texts)
    output.mkdir(parents=True, exist_ok=True)
    draw_points(points, tasks).save(output / "instructions.png")
    return {"nearest neighbour is of the same task": nearest_share(points, tasks)}
