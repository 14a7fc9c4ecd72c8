"""What a run leaves to read while it goes on: `log.jsonl`, and trackers such as TensorBoard.

`log.jsonl` holds what is the same at every repetition of the run, and nothing else; speeds go to the
trackers only.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imprompt.core.errors import ImpromptError
from imprompt.core.files import write_whole
from imprompt.training.config import TrainConfig
from imprompt.training.processes import Processes


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
    write_whole(path, lambda file: file.write("".join(f"{line}\n" for line in kept).encode()))


def append(path: Path, figures: Mapping[str, float | int]) -> None:
    """Add a line. Whoever is killed loses at most the end of it."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


class Trackers:
    """Those of accelerate's trackers that the user wants; where there are none nothing happens."""

    def __init__(self, config: TrainConfig, output: Path, step: int, processes: Processes) -> None:
        """Raises an ImpromptError for an unknown tracker or one that is not installed."""
        self._trackers: list[Any] = []
        names = _names(config.report_to) if processes.is_main else []
        if not names:
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState(cpu=processes.device.type == "cpu")  # trackers ask it which process this is
        for name in names:
            if name not in LOGGER_TYPE_TO_CLASS:
                raise ImpromptError(
                    f"There is no tracker {name!r}; known are {', '.join(LOGGER_TYPE_TO_CLASS)}."
                )
            if importlib.util.find_spec(name) is None:
                raise ImpromptError(
                    f"The tracker {name} is not installed: pip install {name}, or train.report_to=none."
                )
            kind: Any = LOGGER_TYPE_TO_CLASS[name]
            options: dict[str, Any] = {}
            if kind.requires_logging_directory:
                options["logging_dir"] = str(output)
            if name == "tensorboard":
                options["purge_step"] = step + 1  # what a killed run wrote beyond is written again
            # The run's name is its folder's.
            tracker = kind("tensorboard" if name == "tensorboard" else output.name, **options)
            tracker.start()
            if step == 0:
                tracker.store_init_configuration(dataclasses.asdict(config))
            self._trackers.append(tracker)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Numbers, of one step."""
        for tracker in self._trackers:
            tracker.log(dict(figures), step=step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture, for trackers that take some."""
        values = np.asarray(picture.convert("RGB"))[None]
        for tracker in self._trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: values}, step=step, **layout)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def _names(report_to: str) -> list[str]:
    if report_to == "auto":
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    return [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
