"""Control maps that a user brings: folders of pictures named as the images are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imprompt.core.errors import ImpromptError
from imprompt.data.filters import Unusable
from imprompt.data.pairs import IMAGE_SUFFIXES, Pair, Part, shown


def with_maps(parts: Sequence[Part], folders: Mapping[str, Path]) -> list[Part]:
    """The same parts, whose pairs also know their maps: of `a/cat.jpg`, `FOLDER/a/cat.png` or such.

    Raises:
        ImpromptError: there is no such folder.
    """
    for kind, folder in folders.items():
        if not folder.is_dir():
            raise ImpromptError(f"There is no folder {folder} with {kind} maps.")
    return [replace(part, pairs=_Mapped(part, dict(folders))) for part in parts]


@dataclass(frozen=True)
class _Mapped:
    part: Part
    folders: dict[str, Path]

    def __call__(self) -> list[Pair]:
        return [self.mapped(pair) for pair in self.part.pairs()]

    def mapped(self, pair: Pair) -> Pair:
        maps: dict[str, Path] = {}
        for kind, folder in self.folders.items():
            stem = os.path.splitext(pair.name)[0]
            found = [
                file for suffix in IMAGE_SUFFIXES if (file := folder / f"{stem}{suffix}").is_file()
            ]
            if not found:
                why = f"no {kind} map: there is no {shown(stem)}.png (or other picture) in {folder}"
                return replace(pair, read_caption=_Missing(pair, why))
            maps[kind] = found[0]
        return replace(pair, maps=maps)


@dataclass(frozen=True)
class _Missing:
    """Refuses a pair, but only for what was right otherwise."""

    pair: Pair
    why: str

    def __call__(self) -> str:
        self.pair.read_caption()
        raise Unusable("map missing", self.why)
