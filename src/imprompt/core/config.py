"""Configuration: a tree of frozen dataclasses, filled from a TOML preset and then `a.b=value` settings."""

# Strict but for tables of TOML, whose values are of any type:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from imprompt.core.errors import ImpromptError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ImpromptError: no such file, or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ImpromptError(f"There is no preset file {path}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ImpromptError(f"{path} is no valid TOML: {error}") from error


def with_settings(tables: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The tables with `a.b=value` settings laid over them; values are TOML, or else plain text.

    Raises:
        ImpromptError: a setting has no "=" or no name.
    """
    result = copy.deepcopy(dict(tables))
    for setting in settings:
        name, equals, text = setting.partition("=")
        path = name.strip().split(".")
        if not equals or not all(path):
            raise ImpromptError(
                f"The setting {setting!r} is not of the form name=value or a.b=value."
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        table = result
        for part in path[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ImpromptError(
                    f"In the setting {setting!r}, {part!r} is a value, not a group."
                )
        table[path[-1]] = value
    return result


def build(kind: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """An instance of a (possibly nested) dataclass from tables.

    Raises:
        ImpromptError: an unknown name (the nearest known one is named), a missing one, a wrong type.
    """
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        full_name = f"{where}{name}"
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = (
                f"did you mean {where}{close[0]}?" if close else f"known are {', '.join(fields)}."
            )
            raise ImpromptError(f"There is no setting {full_name}; {hint}")
        wanted = hints[name]
        if dataclasses.is_dataclass(wanted):
            if not isinstance(value, Mapping):
                raise ImpromptError(f"{full_name} is a group of settings, not the value {value!r}.")
            arguments[name] = build(wanted, value, f"{full_name}.")  # type: ignore[arg-type]
        else:
            arguments[name] = _converted(value, wanted, full_name)
    missing = [
        name
        for name, field in fields.items()
        if name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ImpromptError(f"The setting {where}{missing[0]} must be given.")
    return kind(**arguments)


def _converted(value: Any, wanted: Any, name: str) -> Any:
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        for choice in get_args(wanted):
            if choice is type(None) and value is None:
                return None
            if choice is not type(None):
                return _converted(value, choice, name)
    if origin is tuple and isinstance(value, list | tuple):
        item = get_args(wanted)[0]
        return tuple(_converted(one, item, name) for one in value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if isinstance(wanted, type) and (
        not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool))
    ):
        raise ImpromptError(f"{name} is {value!r}, but must be of type {wanted.__name__}.")
    return value


def check_range(
    config: Any,
    names: Sequence[str],
    least: int | float = -math.inf,
    most: int | float = math.inf,
    *,
    below: int | float = math.inf,
) -> None:
    """Raise an ImpromptError unless these numbers are from `least` to `most`, and less than `below`."""
    for name in names:
        value = getattr(config, name)
        if least <= value <= most and value < below:
            continue
        limits = [f"at least {least:g}"] if least > -math.inf else []
        limits += [f"at most {most:g}"] if most < math.inf else []
        limits += [f"below {below:g}"] if below < math.inf else []
        raise ImpromptError(f"{name} is {value}, but must be {' and '.join(limits) or 'finite'}.")


def check_left_alone(config: Any, names: Sequence[str], why: str) -> None:
    """Raise an ImpromptError, which says `why`, if one of these was set: it would do nothing."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            raise ImpromptError(
                f"{field.name} is {value!r}, but {why}: leave it at {field.default!r}."
            )


def check_shares(config: Any, names: Sequence[str]) -> None:
    """Raise an ImpromptError unless these are shares of one whole: none below 0, at most 1 together."""
    check_range(config, names, 0, 1)
    if (together := sum(getattr(config, name) for name in names)) > 1 + 1e-9:
        raise ImpromptError(
            f"{', '.join(names)} are {together:g} together, but they are shares of one whole: at most 1."
        )


def to_toml(config: Any) -> str:
    """A dataclass tree (or nested mapping) as TOML: plain values, then groups. None is left out."""
    return _table(config if isinstance(config, Mapping) else dataclasses.asdict(config), "")


def _table(values: Mapping[str, Any], prefix: str) -> str:
    lines = [
        f"{name} = {_literal(value)}"
        for name, value in values.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{prefix}{name}]", _table(value, f"{prefix}{name}.").rstrip("\n")]
    return "\n".join(lines).lstrip("\n") + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(one) for one in value) + "]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{text}"'
