"""What a run leaves to read: `log.jsonl`, a line per interval."""

from __future__ import annotations

import json
from pathlib import Path


def drop_after(path: Path, step: int) -> None:
    """Forget lines past a step: a resumed run writes them again."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            break  # the line that a killed run was writing
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def append(path: Path, figures: dict[str, float | int]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")
