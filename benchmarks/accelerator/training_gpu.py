"""Training on one GPU: this project and the authors' recipe at 512 and 256 px, side by side.

    python benchmarks/accelerator/training_gpu.py            # about ten minutes
    python benchmarks/accelerator/training_gpu.py --batches 1

Completes ../results/training-cuda.json, case by case, the most wanted first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "training.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    cases = [
        ["--size-px", size, "--batch", str(b)] for b in arguments.batches for size in ("512", "256")
    ]
    cases.append(["--size-px", "512", "--batch", "1", "--checkpointing"])
    cases.append(["--size-px", "512", "--batch", str(arguments.batches[0]), "--compile"])
    for case in cases:
        print(" ".join(case), flush=True)
        command = [sys.executable, str(SCRIPT), "--device", "cuda", "--rounds", "2", *case]
        subprocess.run([*command, "--steps", str(arguments.steps)], check=False)


if __name__ == "__main__":
    main()
