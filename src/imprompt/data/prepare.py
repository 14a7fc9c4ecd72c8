"""Pairs to cached columns: the frozen encoders run once, whatever is trained on them afterwards.

What cannot be used is listed with its reason in OUT/quarantine.jsonl and stops nothing. Killed at any
moment and started again, it goes on, and the result is the same; so it is with several processes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imprompt.bases import Base
from imprompt.core.errors import ImpromptError
from imprompt.core.files import disk_errors, write_json
from imprompt.core.progress import progress, say
from imprompt.data.batch import Work
from imprompt.data.columns import check_has_encoders, default_columns, encoder_of, with_framing
from imprompt.data.encoding import PartProgress
from imprompt.data.faces import default_face_encoder
from imprompt.data.filters import Filters
from imprompt.data.finish import finish
from imprompt.data.pairs import Part
from imprompt.data.parts import work_through
from imprompt.data.records import Reading
from imprompt.data.sources import is_embedded_world, open_source
from imprompt.data.store import lock, part_name
from imprompt.data.workers import Job, work_on_ray, work_side_by_side
from imprompt.encoders.face import loaded_face_encoder

LEFT_BY_NOTHING_PREPARED = ("lock", "begun.json.writing", "quarantine.jsonl")


def prepare(
    source: str,
    output: Path,
    base: Base,
    *,
    columns: Sequence[str] | None = None,
    variant: str = "base",
    size_px: int | None = None,
    batch_size: int = 64,
    filters: Filters | None = None,
    reading: Reading | None = None,
    workers: int = 1,
    shard: int = 0,
    num_shards: int = 1,
    engine: str = "local",
    face_encoder: str | None = None,
) -> Path:
    """Encode all pairs of a source into the folder `output`; the same call resumes.

    `columns` are by default what an image-prompt adapter of `variant` is trained on; beside latents a
    base that reads framing gets that, too. Columns that a finished folder lacks are added to it.
    Several processes may work on one folder: `workers` of this machine or, with the engine `ray`, of a
    cluster; or `num_shards` calls, each with another `shard`, of which the last to end makes the folder
    whole. `face_encoder` reads the columns `id_embeds` and, of photos, `landmarks`; see
    `load_face_encoder`. By default it is the embedded world's for its own portraits, and insightface
    for photos, of which those without a face are left out.

    Raises:
        ImpromptError: nothing to prepare, an output folder that holds something else, a full disk.
    """
    size_px = base.image_size_px if size_px is None else size_px
    base.latent_shape(size_px)  # says clearly if the base cannot do this size
    columns = with_framing(base, default_columns(variant) if columns is None else columns)
    for name in columns:
        encoder_of(name)  # says clearly if there is no such column
    check_has_encoders(base, columns)
    if not 0 <= shard < num_shards or workers < 1 or batch_size < 1:
        raise ImpromptError(
            f"There is no shard {shard} of {num_shards} with {workers} workers and batches of "
            f"{batch_size}; shards count from 0, and of the others there must be at least one."
        )
    if engine not in ("local", "ray"):
        raise ImpromptError(f"The engine {engine!r} is unknown; choose local or ray.")
    filters = Filters() if filters is None else filters
    reading = Reading() if reading is None else reading
    parts = open_source(source, reading)
    if face_encoder is None:
        face_encoder = default_face_encoder(source, variant)
    meta = {
        "source": source,
        "base": base.name,
        "encoders_fingerprint": base.encoders_fingerprint(),
        "size_px": size_px,
        "filters": filters.described(),
        "reading": reading.described(),
    }
    begun = _claim(output, meta, columns)
    if (faces := _claim_face_encoder(output, columns, face_encoder)) is not None:
        meta["face_encoder"] = faces
    if _is_whole(output, columns, parts):
        return output
    work = Work(
        columns=begun,
        added_columns=tuple(name for name in columns if name not in begun),
        size_px=size_px,
        batch_size=batch_size,
        filters=filters,
        face_encoder=face_encoder,
    )
    mine = range(shard, len(parts), num_shards)
    with progress(sum(parts[i].num_pairs for i in mine), "preparing", unit="pair") as bar:

        def report(num_done: int, num_more: int) -> None:
            if num_more:
                bar.expect(num_more)
            bar.update(num_done)

        if engine == "ray" or workers > 1:
            start = work_on_ray if engine == "ray" else work_side_by_side
            start(workers, Job(source, reading, output, base, work, mine), report)
        else:
            work_through(parts, output, base, work, mine, report)
    with lock(output, wait=True):
        done = finish(output, parts, meta)
    if done is None:
        say(f"shard {shard} is done; others are still at work")
        return output
    _tell_faults(output, done.faults, done.num_pairs)
    if done.num_rows == 0:
        _give_up(output)
        raise ImpromptError(
            f"None of the {done.num_pairs} pairs of {source} can be used; the first: "
            f"{_first_fault(output)}"
        )
    return output


def _give_up(output: Path) -> None:
    """Leave nothing but the reasons, so that the folder may be used in another way."""
    shutil.rmtree(output / "parts", ignore_errors=True)
    for name in ("begun.json", "parts.npy", "removed.npy", "face_encoder.json"):
        (output / name).unlink(missing_ok=True)


def _claim(output: Path, meta: dict[str, Any], columns: tuple[str, ...]) -> tuple[str, ...]:
    """Make the folder ready for these data, or see that it is; the columns it was begun with.

    Raises:
        ImpromptError: it holds something else.
    """
    with disk_errors(output):
        if output.exists() and not (output / "begun.json").exists():
            others = [name for name in os.listdir(output) if name not in LEFT_BY_NOTHING_PREPARED]
            if others:
                raise ImpromptError(
                    f"{output} is not empty and holds no prepared data. Choose another folder."
                )
        output.mkdir(parents=True, exist_ok=True)
    with lock(output, wait=True):
        begun = output / "begun.json"
        if not begun.exists():
            write_json(begun, {**meta, "columns": list(columns)})
            return columns
        found = json.loads(begun.read_text(encoding="utf-8"))
    differing = [
        f"{name} {found.get(name)!r}, now {meta[name]!r}"
        for name in meta
        if not _same(name, found.get(name), meta[name])
    ]
    if differing:
        raise ImpromptError(
            f"{output} holds other prepared data ({'; '.join(differing)}). Choose another folder."
        )
    return tuple(found["columns"])


def _same(name: str, found: Any, wanted: Any) -> bool:
    """A folder may be named in several ways."""
    if name == "source" and isinstance(found, str) and not is_embedded_world(wanted):
        return os.path.realpath(found) == os.path.realpath(wanted)
    return found == wanted


def _claim_face_encoder(output: Path, columns: Sequence[str], name: str) -> str | None:
    """The fingerprint of the face encoder of these data; None while they hold no identity vectors.

    Raises:
        ImpromptError: they hold those of another one.
    """
    kept = output / "face_encoder.json"
    found = json.loads(kept.read_text(encoding="utf-8"))["fingerprint"] if kept.exists() else None
    if "id_embeds" not in columns:
        return found
    wanted = loaded_face_encoder(name).fingerprint()
    if found not in (None, wanted):
        raise ImpromptError(
            f"{output} holds identity vectors of another face encoder ({found}) than {name} "
            f"({wanted}). Choose another folder."
        )
    with disk_errors(output):
        write_json(kept, {"fingerprint": wanted})
    return wanted


def _is_whole(output: Path, columns: Sequence[str], parts: Sequence[Part]) -> bool:
    """Whether nothing is left to do.

    Raises:
        ImpromptError: the source lacks parts that it had, or holds other pairs.
    """
    num_parts = len(parts)
    description = output / "meta.json"
    if not description.exists():
        return False
    found = json.loads(description.read_text(encoding="utf-8"))
    if num_parts < found["num_parts"]:
        raise ImpromptError(
            f"The source has {num_parts} parts where {output} has {found['num_parts']}: some are gone. "
            "Bring them back, or prepare it into a new folder."
        )
    if found["num_parts"] != num_parts or not set(columns) <= set(found["columns"]):
        return False
    for number, part in enumerate(parts):
        PartProgress.read(output / part_name(number), part)  # which sees that it is the same
    return True


def _tell_faults(output: Path, faults: Counter[str], num_pairs: int) -> None:
    if faults:
        kinds = ", ".join(f"{count} {kind}" for kind, count in faults.most_common())
        say(
            f"{faults.total()} of {num_pairs} pairs could not be used ({kinds}); "
            f"{output / 'quarantine.jsonl'} says why"
        )


def _first_fault(output: Path) -> str:
    with open(output / "quarantine.jsonl", encoding="utf-8") as file:
        first = json.loads(file.readline())
    return f"{first['pair']}: {first['reason']}"
