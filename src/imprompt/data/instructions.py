"""What can be asked of an image prompt: five tasks, each with many wordings of the same wish.

The wordings are text files, one instruction a line, which users extend with files of the same names in
a folder of their own. One rule keeps the tasks apart: an instruction has a keyword of its own task and
none of another's. Those of `object` name what is meant by its kind, for which `{object}` stands.

Source: IP-Adapter-Instruct (2408.03209), section 3.3 (the tasks and their instructions).
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from imprompt.core.errors import ImpromptError

TASKS = ("everything", "style", "object", "composition", "face")
OBJECT = "{object}"
# Beginnings of words. They may stand in instructions of their own task only.
KEYWORDS: dict[str, tuple[str, ...]] = {
    "everything": ("everything", "entire", "whole", "all"),
    "style": ("style", "aesthetic", "technique"),
    "object": ("object", "thing", OBJECT),
    "composition": ("composition", "layout", "arrangement", "structure", "outline"),
    "face": ("face", "facial", "person", "identity", "portrait"),
}
FOLDER = Path(__file__).parent / "instructions"
MAX_ANSWER_BYTES = 1_000_000


def instructions(task: str, folder: Path | None = None) -> tuple[str, ...]:
    """All instructions of a task: those that come with the package, then those in a user's folder.

    Raises:
        ImpromptError: no such task, no such folder, no file of instructions in it, one that cannot be
            read, or a line that breaks the rule.
    """
    check_task(task)
    lines = read_lines(FOLDER / f"{task}.txt")
    if folder is not None:
        if not folder.is_dir():
            raise ImpromptError(f"There is no folder of instructions {folder}.")
        known = [f"{one}.txt" for one in TASKS]
        if not any((folder / name).is_file() for name in known):
            raise ImpromptError(
                f"{folder} holds no instructions; they stand in {', '.join(known)}."
            )
        own = folder / f"{task}.txt"
        lines += read_lines(own) if own.is_file() else []
    for line in lines:
        if fault := fault_of(line, task):
            raise ImpromptError(f"The instruction {line!r} of {task} cannot be used: {fault}.")
    return tuple(dict.fromkeys(lines))


def check_task(task: str) -> None:
    """Raise an ImpromptError that names the tasks, if this is none of them."""
    if task not in TASKS:
        raise ImpromptError(f"There is no task {task!r}; choose one of: {', '.join(TASKS)}.")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are neither empty nor comments.

    Raises:
        ImpromptError: it cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ImpromptError(f"The instructions {path} cannot be read: {error}.") from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def fault_of(instruction: str, task: str) -> str | None:
    """Why an instruction breaks the keyword rule; None if it keeps it."""
    for other in TASKS:
        if other != task and (word := _keyword_in(instruction, other)):
            return f"{word!r} is a keyword of the task {other}"
    if task == "object":
        return None if OBJECT in instruction else f"it must name the object: write {OBJECT}"
    if not _keyword_in(instruction, task):
        return f"it has none of the task's keywords ({', '.join(KEYWORDS[task])})"
    return None


def _keyword_in(instruction: str, task: str) -> str | None:
    text = instruction.lower()
    for word in KEYWORDS[task]:
        if word == OBJECT:
            if OBJECT in text:
                return word
        # "all" as a word only: many words begin with it.
        elif re.search(
            rf"\b{word}{'' if word != 'all' else chr(92) + 'b'}", text.replace(OBJECT, "")
        ):
            return word
    return None


def filled(instruction: str, kind: str) -> str:
    """An instruction with the kind of the object in its place."""
    return instruction.replace(OBJECT, kind)


def ask_for_more(
    task: str,
    number: int,
    *,
    endpoint: str,
    model: str,
    key: str = "",
    examples: Sequence[str] | None = None,
    folder: Path | None = None,
    timeout_seconds: float = 60.0,
) -> list[str]:
    """New instructions from a language model behind any OpenAI-compatible endpoint.

    What breaks the keyword rule or is known already is left out, so fewer may come than asked for.
    Nothing here is needed for training; the instructions that come with the package suffice.

    Args:
        endpoint: the address up to and with "/v1".
        model: its name there.
        key: sent as bearer token if not empty.
        examples: what is known already, for all that `instructions` knows.
        folder: of instructions of your own, which are known, too.

    Raises:
        ImpromptError: no such task, or the endpoint does not answer as expected.
    """
    known = list(instructions(task, folder)) if examples is None else list(examples)
    forbidden = [w for other in TASKS if other != task for w in KEYWORDS[other] if w != OBJECT]
    wish = (
        f"Write {number} short, different instructions, one per line, nothing else. Each tells a "
        f"painter to take only the {task} from a reference image. "
        + (f"Write {OBJECT} for the object. " if task == "object" else "")
        + f"Use one of these words: {', '.join(KEYWORDS[task])}. Never use these words: "
        f"{', '.join(forbidden)}. Examples: {'; '.join(known[:5])}"
    )
    body = {"model": model, "messages": [{"role": "user", "content": wish}]}
    answer = _post(f"{endpoint.rstrip('/')}/chat/completions", body, key, timeout_seconds)
    try:
        text = answer["choices"][0]["message"]["content"]
        lines = [re.sub(r"^[\s\-*\d.)]+", "", line).strip().lower() for line in text.splitlines()]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ImpromptError(
            f"{endpoint} answered without an instruction: {answer}"[:300]
        ) from error
    fitting = [line for line in lines if line and not fault_of(line, task)]
    return [line for line in dict.fromkeys(fitting) if line not in known]


def _post(address: str, body: Mapping[str, object], key: str, timeout_seconds: float):
    if not address.startswith(("http://", "https://")):
        raise ImpromptError(f"{address} is no address of a language model: it begins with http.")
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
            return json.loads(response.read(MAX_ANSWER_BYTES))
    except (OSError, ValueError) as error:
        raise ImpromptError(f"{address} cannot be asked: {error}.") from error
