"""Started by torchrun: one run from its beginning, and one that goes on from another engine's checkpoint."""

import json
import sys
from pathlib import Path

from imprompt.training import run

engine, system, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
settings = json.loads(sys.argv[4])
leave = run.leave_processes
run.leave_processes = lambda processes: None  # the second run has the same company
for output in sys.argv[5:]:
    last = output == sys.argv[-1]
    run.leave_processes = leave if last else run.leave_processes
    run.run_training(
        system,
        data=folder / "data",
        base=str(folder / "base"),
        output=Path(output),
        settings=settings,
        engine=engine,
        num_processes=2,
    )
