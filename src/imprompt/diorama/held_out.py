"""Which seeds are kept for measuring: what they show, no training sees.

Persons are kept apart by who they are and not by seeds; see `people.gallery`.
"""

from __future__ import annotations

UNSEEN_SCENES = range(1_000_000, 2_000_000)
UNSEEN_PORTRAITS = range(6_000_000, 6_300_000)
UNSEEN_LESSONS = range(1_000_000, 2_000_000)  # groups of lessons, one of each of Instruct's tasks


def is_held_out(seeds: range, kept: range) -> bool:
    """Whether any of some consecutive seeds is among those kept for measuring."""
    return seeds.start < kept.stop and kept.start < seeds.stop
