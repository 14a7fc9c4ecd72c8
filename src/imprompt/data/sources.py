"""Where pairs come from: what the user names, as parts that are the same at every start."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import generator
from imprompt.data.archives import archive_part
from imprompt.data.filters import Unusable
from imprompt.data.instruct_scenes import instruct_example
from imprompt.data.instructions import TASKS
from imprompt.data.maps import with_maps
from imprompt.data.pairs import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    Condition,
    Pair,
    Part,
    decode_caption,
    decode_record,
    faulty,
    identity_of,
    read_file,
    shown,
)
from imprompt.data.records import Reading, is_list, list_parts
from imprompt.data.tables import dataset_parts, is_dataset, is_table, table_parts
from imprompt.diorama import (
    everyday_caption,
    portrait_caption,
    reference_seed,
    training_portrait,
    training_scene,
)
from imprompt.diorama.held_out import UNSEEN_LESSONS, UNSEEN_PORTRAITS, UNSEEN_SCENES, is_held_out

PAIRS_PER_PART = 4096


def open_source(source: str, reading: Reading | None = None) -> list[Part]:
    """The parts of a source, in an order that is always the same.

    Raises:
        ImpromptError: no such source, or nothing in it.
    """
    reading = Reading() if reading is None else reading
    name = source.partition(":")[0]
    is_diorama = is_embedded_world(source)
    if reading.maps:
        if is_diorama:
            raise ImpromptError("Scenes bring their own maps; leave --map out.")
        return with_maps(open_source(source, replace(reading, maps={})), reading.maps)
    if is_diorama:
        return _diorama(source, _DIORAMA[name])
    path = Path(source)
    if path.is_dir():
        return dataset_parts(path, reading) if is_dataset(path) else _folder(path, reading)
    if path.is_file() and path.suffix.lower() == ".tar":
        return [archive_part(path, path.name, reading.caption_key)]
    if path.is_file() and is_list(path):
        return list_parts(path, reading, PAIRS_PER_PART)
    if path.is_file() and is_table(path):
        return table_parts([path], reading, PAIRS_PER_PART)
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise ImpromptError(
            f"{source} is compressed, so its pairs cannot be read one by one; decompress it to a .tar."
        )
    raise ImpromptError(
        f"{source!r} is no source of pairs: give a folder of images with .txt captions, a .tar or a "
        "folder of them, a .json, .jsonl, .csv, .tsv or .parquet list, a dataset on disk, or "
        "diorama:COUNT, diorama-people:COUNT or diorama-instruct:COUNT."
    )


def is_embedded_world(source: str) -> bool:
    """Whether a source is scenes that are drawn, and not photos."""
    return ":" in source and source.partition(":")[0] in _DIORAMA


def _diorama(source: str, pair_of: Callable[[int], Pair]) -> list[Part]:
    try:
        numbers = [int(part) for part in source.split(":")[1:]]
        count, first = numbers if len(numbers) == 2 else (numbers[0], 0)
        if count < 1 or first < 0 or len(numbers) > 2:
            raise ValueError
    except (ValueError, IndexError) as error:
        raise ImpromptError(
            f"{source!r}: write {source.partition(':')[0]}:COUNT or, with the first scene's seed, "
            f"{source.partition(':')[0]}:COUNT:FIRST_SEED."
        ) from error
    seeds = range(first, first + count)
    _check_not_held_out(source, seeds)
    return [
        Part(
            f"scenes {some.start} to {some.stop - 1}",
            len(some),
            identity_of(some),
            lambda some=some: [pair_of(seed) for seed in some],
        )
        for some in (seeds[i : i + PAIRS_PER_PART] for i in range(0, count, PAIRS_PER_PART))
    ]


def _check_not_held_out(source: str, seeds: range) -> None:
    """Raise an ImpromptError for pairs that measurements ask for: trained on, they would measure nothing."""
    name = source.partition(":")[0]
    kept = {"diorama": UNSEEN_SCENES, "diorama-people": UNSEEN_PORTRAITS}.get(name, UNSEEN_LESSONS)
    if name == "diorama-instruct":
        kept = range(kept.start * len(TASKS), kept.stop * len(TASKS))  # the tasks take turns
    if is_held_out(seeds, kept):
        raise ImpromptError(
            f"{source!r}: {kept.start} to {kept.stop - 1} are kept for measuring; "
            "take others, with another :FIRST_SEED."
        )


def diorama_pair(seed: int) -> Pair:
    """The scene of a seed, with a caption that tells all of it or a part."""
    scene = training_scene(seed)
    text = everyday_caption(scene, generator(seed, 0, "caption"))
    return Pair(f"diorama {seed}", lambda: text, scene)


def instruct_pair(number: int, task: str | None = None) -> Pair:
    """A lesson of Instruct on the embedded world; without a task they take turns."""
    example = instruct_example(number, task)
    condition = Condition(example.condition, example.instruction, example.task, example.kept)
    return Pair(
        f"diorama {example.task} {number}",
        lambda: example.prompt,
        example.target,
        read_condition=lambda: condition,
    )


def portrait_pair(seed: int) -> Pair:
    """A portrait, whose reference is another portrait of the same person; the caption says not who."""
    scene = training_portrait(seed)
    text = portrait_caption(scene, generator(seed, 0, "caption"))
    reference = training_portrait(reference_seed(seed))
    return Pair(f"diorama person {seed}", lambda: text, scene, reference=reference)


_DIORAMA: dict[str, Callable[[int], Pair]] = {
    "diorama": diorama_pair,
    "diorama-people": portrait_pair,
    "diorama-instruct": instruct_pair,
    **{f"diorama-instruct/{task}": partial(instruct_pair, task=task) for task in TASKS},
}


def _folder(folder: Path, reading: Reading) -> list[Part]:
    images, archives, tables, orphans = _walk(folder)
    if not images and not archives:
        if tables:
            return table_parts([folder / name for name in tables], reading, PAIRS_PER_PART)
        raise ImpromptError(
            f"{folder} holds no images; known are {', '.join(IMAGE_SUFFIXES)}, each with a .txt, and "
            ".tar archives of such."
        )
    names = sorted([*images, *orphans])
    parts = []
    for start in range(0, len(names), PAIRS_PER_PART):
        some = names[start : start + PAIRS_PER_PART]
        parts.append(
            Part(
                f"files {start} to {start + len(some) - 1}",
                len(some),
                identity_of(*some),
                lambda some=some: [
                    _ImageFile(folder / name, reading.caption_key).pair(name) for name in some
                ],
            )
        )
    return parts + [archive_part(folder / name, name, reading.caption_key) for name in archives]


def _walk(folder: Path) -> tuple[list[str], list[str], list[str], list[str]]:
    """Images, archives, tables, and captions without an image, by names relative to the folder.

    Hidden files and folders are passed over: they are copies that other programs keep.
    """
    images, archives, tables, orphans = [], [], [], []

    def refuse(error: OSError) -> None:
        raise ImpromptError(f"Cannot list {error.filename}: {error.strerror}.") from error

    # Links to folders are not followed: they may lead in circles.
    for place, folders, all_files in os.walk(folder, onerror=refuse):
        files = [name for name in all_files if not name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(place, folder)
        prefix = "" if relative == "." else f"{relative}/"
        stems = set()
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                images.append(prefix + name)
                stems.add(stem)
            elif suffix.lower() == ".tar":
                archives.append(prefix + name)
            elif suffix.lower() == ".parquet":
                tables.append(prefix + name)
        orphans += [
            prefix + name
            for name in files
            if name.endswith(".txt") and os.path.splitext(name)[0] not in stems
        ]
    return images, sorted(archives), sorted(tables), orphans


@dataclass(frozen=True)
class _ImageFile:
    """An image with a .txt, or the .json that img2dataset writes, of the same name beside it."""

    file: Path
    caption_key: str | None

    def pair(self, name: str) -> Pair:
        if self.file.suffix == ".txt":
            why = f"there is no image beside {shown(self.file.name)}; known are "
            return faulty(name, "image missing", why + ", ".join(IMAGE_SUFFIXES))
        return Pair(shown(name), self.read_caption, self.file, self.read_scores)

    def read_caption(self) -> str:
        text, record = self.file.with_suffix(".txt"), self.file.with_suffix(".json")
        if (self.caption_key or not os.path.lexists(text)) and record.is_file():
            text = record
        elif not os.path.lexists(text):
            if self.file.is_symlink():  # a link in a circle is the image's fault, not a caption's
                read_file(self.file, MAX_IMAGE_BYTES, "image missing")
            raise Unusable("caption missing", f"no caption: {shown(text.name)} is missing")
        content = read_file(text, MAX_CAPTION_BYTES, "caption missing")
        return decode_caption(content, text.name, self.caption_key)

    def read_scores(self) -> Mapping[str, Any]:
        record = self.file.with_suffix(".json")
        return decode_record(read_file(record, MAX_CAPTION_BYTES, "score missing"), record.name)
