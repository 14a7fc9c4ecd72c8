"""Shapes in signatures are checked in every test; `tests/` itself can be imported from."""

import sys
from pathlib import Path

from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
install_import_hook("imprompt", "beartype.beartype")
