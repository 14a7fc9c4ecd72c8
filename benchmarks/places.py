"""Whether what the embedded base's image encoder says of a picture tells where its object stands.

    imprompt prepare diorama-instruct:15000 data/ --variant instruct-words --batch-size 250
    python benchmarks/places.py data/

Two small resamplers are trained to tell left, centre and right from the encoder's states: one reads them
as they are, one with a learned position for each. docs/instruct-on-diorama.md gives the shares that are right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from imprompt.adapters.resampler import HEAD_DIM, Resampler
from imprompt.core.progress import progress
from imprompt.data.dataset import Columns
from imprompt.data.instruct_scenes import instruct_example
from imprompt.data.instructions import TASKS

PLACES = ("left", "center", "right")
NUM_HELD_OUT = 600
NUM_HEADS = 3


def read_compositions(data: Path) -> tuple[Tensor, Tensor]:
    """States of the pictures of all lessons in composition, (pictures, states, dim), and their places."""
    columns = Columns.open(data)
    turn = TASKS.index("composition")
    lessons = range(turn, len(columns), len(TASKS))
    states = columns.rows(lessons, ["condition_states"])["condition_states"].float()
    scenes = [instruct_example(number).condition for number in lessons]
    return states, torch.tensor([PLACES.index(scene.placement) for scene in scenes])


def share_right(states: Tensor, places: Tensor, *, has_positions: bool, steps: int) -> float:
    """How often a reader trained on all pictures but the last is right on these."""
    torch.manual_seed(0)
    _, num_states, dim = states.shape
    reader = nn.Sequential(
        Resampler(
            dim,
            HEAD_DIM,
            num_tokens=8,
            dim=HEAD_DIM * NUM_HEADS,
            num_heads=NUM_HEADS,
            depth=2,
            num_positions=num_states if has_positions else 0,
        ),
        nn.Flatten(),
        nn.Linear(8 * HEAD_DIM, len(PLACES)),
    )
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3)
    known = len(states) - NUM_HELD_OUT
    with progress(steps, "with positions" if has_positions else "without", unit="step") as bar:
        for _ in range(steps):
            rows = torch.randint(known, (64,))
            loss = cross_entropy(reader(states[rows]), places[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update(1)
    with torch.no_grad():
        told = torch.cat([reader(part) for part in states[known:].split(100)]).argmax(1)
    return (told == places[known:]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="lessons that `imprompt prepare` made")
    parser.add_argument("--steps", type=int, default=500, help="of each reader")
    arguments = parser.parse_args()
    states, places = read_compositions(arguments.data)
    for has_positions in (False, True):
        share = share_right(states, places, has_positions=has_positions, steps=arguments.steps)
        print(f"{'with' if has_positions else 'without'} positions: {share:.1%} right")


if __name__ == "__main__":
    main()
