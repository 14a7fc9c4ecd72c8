"""What can be set of a system and of a run, with what is said of it where it is defined."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap

from imprompt.systems.catalogue import trainable
from imprompt.training.config import TrainConfig


def describe_settings(system_name: str) -> str:
    """A page of all settings of a system and of its training: name, default, meaning.

    Raises:
        ImpromptError: there is no such system.
    """
    module, options = trainable(system_name).load()
    lines = [(module.__doc__ or "").strip(), ""]
    for group, kind in (("system", options), ("train", TrainConfig)):
        meanings = field_docstrings(kind)
        for field in dataclasses.fields(kind):
            default = (
                "must be given" if field.default is dataclasses.MISSING else repr(field.default)
            )
            lines.append(f"{group}.{field.name} = {default}")
            lines += textwrap.wrap(
                meanings.get(field.name, ""), 96, initial_indent="    ", subsequent_indent="    "
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def field_docstrings(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass and of those it extends."""
    found: dict[str, str] = {}
    for one in reversed([cls for cls in kind.__mro__ if dataclasses.is_dataclass(cls)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(definition, ast.ClassDef)
        for before, after in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[before.target.id] = " ".join(str(after.value.value).split())
    return found
