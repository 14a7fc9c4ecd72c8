"""The folder of a run: whose it is, and when to stop writing to it."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imprompt.core.errors import ImpromptError
from imprompt.core.files import write_json
from imprompt.core.progress import say
from imprompt.training.config import FREE_TO_CHANGE, TrainConfig
from imprompt.training.processes import Processes


def describe(config: TrainConfig, data: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same, as it is kept in run.json.

    `others["num_parts"]`: into how many parts a batch is cut, where that affects what is learned.
    """
    return {"config": dataclasses.asdict(config), "data": data, **others}


def claim_output(output: Path, identity: dict[str, Any]) -> None:
    """Make the folder this run's own, or check that it is.

    Raises:
        ImpromptError: the folder holds something else; the message says what differs.
    """
    description = output / "run.json"
    wanted = json.loads(json.dumps(identity, default=str))
    if description.exists():
        try:
            found = json.loads(description.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ImpromptError(f"{description} is damaged: {error}.") from error
        # What a run did not know of when it was begun has been at its default.
        defaults = {
            field.name: field.default
            for field in dataclasses.fields(TrainConfig)
            if field.default is not dataclasses.MISSING
        }
        found["config"] = defaults | found.get("config", {})
        _leave_out_what_one_does_not_know(found.get("data", {}), wanted["data"])
        if "num_parts" in wanted:
            found.setdefault("num_parts", found["config"]["gradient_accumulation_steps"])
        is_constant = found["config"].get("schedule") == "constant"
        free = (*FREE_TO_CHANGE, "steps") if is_constant else FREE_TO_CHANGE
        for name in free:
            found["config"].pop(name, None)
        compared = wanted | {"config": {n: v for n, v in wanted["config"].items() if n not in free}}
        differing = sorted(_differences(found, compared))
        if differing:
            raise ImpromptError(
                f"{output} holds another run (different: {'; '.join(differing[:3])}). "
                "Repeat that run's settings to go on with it, or choose another output folder; "
                "system.start_from lets a new run begin with what this one has learned."
            )
        return
    if output.exists() and any(path.name != "run.json.writing" for path in output.iterdir()):
        raise ImpromptError(
            f"{output} is not empty and holds no run. Choose another output folder."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImpromptError(f"Cannot write to {output}: {error.strerror}.") from error
    write_json(description, wanted)


def _leave_out_what_one_does_not_know(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Of what is known of the data: runs on several folders did not always keep what is in them, and
    runs that read no faces kept whose vectors lay beside what they read."""
    if "content_fingerprint" not in found:
        wanted.pop("content_fingerprint", None)
    if "face_encoder" not in wanted:
        found.pop("face_encoder", None)


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in found.keys() | wanted.keys():
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
    elif found != wanted:
        yield f"{name} was {found!r}, now {wanted!r}"


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C and SIGTERM only set a flag, which the yielded function reads."""
    requested = False

    def request(number: int, frame: object) -> None:
        nonlocal requested
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested = True
        say("stopping after this step (Ctrl-C again stops at once, without saving)")

    kept: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            kept[number] = signal.signal(number, request)
    except ValueError:
        pass  # not in the main thread: whoever runs us there handles signals
    try:
        yield lambda: requested
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def say_once(processes: Processes, message: str) -> None:
    """Of several processes one says it."""
    if processes.is_main:
        say(message)
