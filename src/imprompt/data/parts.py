"""Going through the parts of a source, each of which is one process's at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from imprompt.bases import Base
from imprompt.core.files import disk_errors
from imprompt.data.batch import Work
from imprompt.data.encoding import PartProgress, Report, encode_part, missing_columns
from imprompt.data.pairs import Part
from imprompt.data.store import lock, part_name

SECONDS_BETWEEN_LOOKS = 0.2


def work_through(
    parts: Sequence[Part],
    output: Path,
    base: Base,
    work: Work,
    mine: Sequence[int],
    report: Report,
) -> None:
    """Do every part that no other process is at, until none of `mine` is left.

    Raises:
        ImpromptError: the disk is full, or the source has changed.
    """
    waiting = list(mine)
    with ThreadPoolExecutor(max(1, min(8, torch.get_num_threads()))) as pool:
        while waiting:
            before = len(waiting)
            for number in list(waiting):
                folder = output / part_name(number)
                with disk_errors(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                with lock(folder, wait=False) as held:
                    if not held:
                        continue
                    if missing_columns(PartProgress.read(folder, parts[number]), work):
                        encode_part(parts[number], folder, base, work, pool, report)
                    else:
                        report(parts[number].num_pairs, 0)
                waiting.remove(number)
            if waiting and len(waiting) == before:
                time.sleep(SECONDS_BETWEEN_LOOKS)
