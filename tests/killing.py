"""A command that is killed with no warning again and again, and started again each time."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from slow import SLOW_TESTS

NUM_KILLS = 20 if SLOW_TESTS else 5
SECONDS_AT_MOST = 300


def run_with_kills(arguments: Sequence[str], done: Callable[[], int], total: int, seed: int) -> int:
    """Run `python …` to its end with NUM_KILLS kills at random moments; how many hit it at work.

    `done` tells how much of `total` has been done. The first kill comes while the program still
    starts; each other one a moment after a random amount, somewhat more than the one before.
    """
    moments = random.Random(seed)
    targets = [0, *sorted(moments.sample(range(1, total), NUM_KILLS - 1))]
    hits = 0
    for target in targets:
        process = _start(arguments)
        if target == 0:
            time.sleep(moments.uniform(0.5, 3.0))
        deadline = time.monotonic() + SECONDS_AT_MOST
        while process.poll() is None and done() < target:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 0.05))
        process.kill()
        hits += process.wait() == -signal.SIGKILL
    process = _start(arguments)
    _, errors = process.communicate(timeout=SECONDS_AT_MOST)
    assert process.returncode == 0, errors[-3000:]
    return hits


def run_once(arguments: Sequence[str]) -> None:
    process = _start(arguments)
    _, errors = process.communicate(timeout=SECONDS_AT_MOST)
    assert process.returncode == 0, errors[-3000:]


def _start(arguments: Sequence[str]) -> subprocess.Popen:
    source = Path(__file__).parents[1] / "src"
    paths = f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
