"""Shapes in signatures are checked in every test; `tests/` itself can be imported from."""

import os
import sys
from pathlib import Path

from jaxtyping import install_import_hook

# Before torch is imported, here and in what tests start: the processes share the cores.
processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if processes > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))

sys.path.insert(0, str(Path(__file__).parent))
install_import_hook("imprompt", "beartype.beartype")
