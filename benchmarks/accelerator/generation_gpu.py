"""What an image prompt costs on a GPU: whole generations, eager and compiled, in five minutes.

    python benchmarks/accelerator/generation_gpu.py

Runs benchmarks/generation.py for what a CPU cannot show and adds to
benchmarks/results/generation-cuda.json; prints the README's table of it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "generation.py"
# The most wanted first: what does not fit into the time is left out.
RUNS = [
    ["--cases", "1 image", "4 images, masks"],
    ["--compiled", "--variants", "base", "--images", "1", "--cases", "1 image"],
    ["--compiled", "--variants", "plus", "--images", "1", "--cases", "1 image"],
    ["--cases", "4 images", "1 image, λ = 0"],
    ["--cases", "2 images", "3 images"],
    ["--compiled", "--variants", "full", "--images", "1", "--cases", "1 image"],
]


def main() -> None:
    parser = argparse.ArgumentParser(description="What an image prompt costs on a GPU.")
    parser.add_argument("--seconds", type=float, default=300, help="for all of it")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    for run in RUNS:
        left = deadline - time.monotonic()
        # A case is written as soon as it is measured, so one that runs late may be stopped.
        if left < 20:
            break
        common = ["--device", "cuda", "--only", "time", "--seconds", str(max(1, left - 30))]
        command = [sys.executable, str(BENCHMARK), *common, *run]
        print(" ".join(command), flush=True)
        try:
            subprocess.run(command, check=True, timeout=left)
        except subprocess.TimeoutExpired:
            break
    work = ["--device", "cuda", "--only", "work", "--images", "1", "4"]
    subprocess.run([sys.executable, str(BENCHMARK), *work], check=True)


if __name__ == "__main__":
    main()
