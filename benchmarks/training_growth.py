"""How the cost of training grows: with the number of rows, and with the number of processes.

    python benchmarks/training_growth.py             # 1,000 to 1,000,000 rows; 1 and 2 processes

Rows are synthetic features of the embedded base's shapes, so that a million of them fit a small disk. For
each number of rows a fresh process opens them and trains an image-prompt adapter for some steps with
`imprompt train`'s own function: seconds from opening to the end of the first step, memory held after the
first step and after the last, microseconds to find a batch's rows and to read them. On a CPU without cores to spare
two processes take as long as one; what is measured is what working together costs.

Results go to benchmarks/results/training-growth.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "training-growth.json"
ROWS = (1_000, 10_000, 100_000, 1_000_000)
SETTINGS = ["train.batch_size=8", "train.validation_rows=8", "train.precision=bfloat16"]
STEPS = 40


def write_rows(folder: Path, count: int) -> None:
    """Columns as `imprompt prepare` writes them for the embedded base."""
    import torch

    from imprompt.bases import load_base
    from imprompt.data.dataset import ColumnsWriter

    base: Any = load_base("diorama")
    shape = base.latent_shape()
    folder.mkdir()
    writer, piece = ColumnsWriter(folder), 1000
    ids = base.tokenize([f"picture {i}" for i in range(piece)])
    for start in range(0, count, piece):
        writer.write(
            start,
            {
                "latent_mean": torch.randn(piece, *shape).half(),
                "latent_logvar": torch.full((piece, *shape), -5.0).half(),
                "image_embeds": torch.randn(piece, base.image_encoder.embed_dim).half(),
                "text_ids": ids,
            },
        )
    writer.finish(count, {"encoders_fingerprint": base.encoders_fingerprint(), "base": base.name})


def resident_mb() -> float:
    """Memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(folder: Path) -> dict[str, float]:
    """Train on the rows for a while, in this process."""
    import numpy as np

    from imprompt.bases import load_base
    from imprompt.data.dataset import Columns
    from imprompt.systems.image_prompt import ImagePromptSystem
    from imprompt.training.order import rows_of_samples
    from imprompt.training.run import run_training

    base = load_base("diorama")  # not of the data; importing and loading it is the same for all
    moments, memory = [], []
    loss = ImagePromptSystem.loss

    def watched(self: Any, batch: Any, randomness: Any) -> Any:
        moments.append(time.perf_counter())
        memory.append(resident_mb())
        return loss(self, batch, randomness)

    ImagePromptSystem.loss = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as output:
        begin = time.perf_counter()
        run_training(
            "image-prompt",
            data=folder,
            base=base,
            output=Path(output) / "run",
            settings=[*SETTINGS, f"train.steps={STEPS}", "train.report_to=none"],
        )
    columns = Columns.open(folder)
    order, read = [], []
    for step in range(50):
        start = time.perf_counter()
        rows = rows_of_samples(range(step * 8, step * 8 + 8), len(columns), seed=1)
        order.append(time.perf_counter() - start)
        columns.rows(rows, columns.names)
        read.append(time.perf_counter() - start - order[-1])
    return {
        "rows": len(columns),
        "seconds_to_second_step": moments[1] - begin,
        "memory_mb_second_step": memory[1],
        "memory_mb_last_step": memory[-1],
        "microseconds_to_order_a_batch": 1e6 * float(np.median(order)),
        "microseconds_to_read_a_batch": 1e6 * float(np.median(read)),
    }


def processes(folder: Path, count: int) -> dict[str, float]:
    """Steps per second of `imprompt train` by so many processes, one thread each."""
    launcher = [] if count == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    with tempfile.TemporaryDirectory() as output:
        run = Path(output) / "run"
        command = [
            *(sys.executable, *launcher, "-m", "imprompt", "train", "image-prompt"),
            *("--data", str(folder), "--output", str(run), "--processes", str(count)),
            *(part for setting in SETTINGS for part in ("--set", setting)),
            *("--set", "train.steps=100", "--set", "train.log_every_steps=10"),
        ]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        seen: dict[int, float] = {}
        while process.poll() is None:
            log = run / "log.jsonl"
            lines = log.read_text().count("\n") if log.exists() else 0
            if lines and lines not in seen:
                seen[lines] = time.perf_counter()
            time.sleep(0.01)
    assert process.returncode == 0
    first, last = min(seen), max(n for n in seen if n <= 10)
    return {
        "processes": count,
        "samples_per_second": 8 * 10 * (last - first) / (seen[last] - seen[first]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        for count in arguments.rows:
            folder = Path(temporary) / str(count)
            write_rows(folder, count)
            command = [sys.executable, __file__, "--measure", str(folder)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results["rows"].append(json.loads(output.splitlines()[-1]))
            print(results["rows"][-1], flush=True)
        folder = Path(temporary) / str(arguments.rows[0])
        results["processes"] = [processes(folder, count) for count in (1, 2)]
        print(results["processes"], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
