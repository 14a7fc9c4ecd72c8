"""The model card that a finished run leaves beside what it exported: what was trained, on what, how well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imprompt.core.config import to_toml
from imprompt.core.files import write_whole
from imprompt.systems.catalogue import trainable
from imprompt.training import log

# How what a run exports is used, by its name; other exports are parts of a base.
USES = {
    "adapter.safetensors": """\
adapter = imprompt.load_adapter("adapter.safetensors")
prompt = imprompt.ImagePrompt("photo.png", adapter=adapter)
images = imprompt.generate(base, "a text", prompt)""",
    "control": """\
control = imprompt.Control(image="map.png", model=imprompt.load_control("control"))
images = imprompt.generate(base, "a text", controls=control)""",
    "identity": """\
person = imprompt.IdentityPrompt("face.png", imprompt.load_identity("identity"))
images = imprompt.generate(base, "a text", identities=person)""",
}


def write_card(
    output: Path,
    export: Path,
    *,
    system: str,
    base: str,
    base_fingerprint: str,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    preset: str | None,
) -> Path:
    """Write `output / README.md`, in the form that model hubs show."""
    lines = log.read(output / "log.jsonl")
    validations = [line for line in lines if any(n.startswith("validation_") for n in line)]
    losses = [line for line in lines if "loss" in line]
    parts = [
        f"---\nlibrary_name: imprompt\nbase_model: {base}\ntags: [imprompt, {system}]\n---",
        f"# {trainable(system).title or system} for {base}: {output.resolve().name}",
        f"`{export.name}` is the result of `imprompt train {system}`"
        + (f" with the preset `{preset}`" if preset else "")
        + f" on the base `{base}` ({base_fingerprint}).",
    ]
    if export.name in USES:
        lines_of_use = [
            "import imprompt",
            "",
            f'base = imprompt.load_base("{base}")',
            USES[export.name],
        ]
        parts.append("## Use\n\n```python\n" + "\n".join(lines_of_use) + "\n```")
    if validations:
        parts.append("## On held-out rows\n\n" + _table(validations))
        best = output / "best" / "best.json"
        if best.is_file():
            found = json.loads(best.read_text(encoding="utf-8"))
            parts.append(
                f"The best weights by validation are in `best/`: {found['by'].replace('_', ' ')} was "
                f"{found['value']:.5g} at step {found['step']:,}."
            )
    if losses:
        parts.append(f"The last training loss was {losses[-1]['loss']:.5g}.")
    previews = sorted((output / "previews").glob("step-*.png"))
    if previews:
        parts.append(f"![held-out pictures and what is made of them](previews/{previews[-1].name})")
    told = {name: _in_words(value) for name, value in sorted(data.items())}
    described = "\n".join(f"- {name}: {words}" for name, words in told.items() if words)
    parts.append(f"## Data\n\n{described}")
    parts.append(f"## Settings\n\n```toml\n{to_toml(settings)}```")
    card = output / "README.md"
    write_whole(card, lambda file: file.write(("\n\n".join(parts) + "\n").encode()))
    return card


def _in_words(value: Any) -> str:
    """A value as it is read: of groups what is set in them, of lists what is in them."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        told = {name: _in_words(one) for name, one in value.items()}
        return ", ".join(f"{name} {words}" for name, words in told.items() if words)
    if isinstance(value, list | tuple):
        return ", ".join(_in_words(one) for one in value)
    return str(value)


def _table(validations: list[dict[str, Any]]) -> str:
    """The figures of at most eight validations, evenly spread, the last among them."""
    names = [name for name in validations[-1] if name != "step"]
    every = max(1, -(-len(validations) // 8))
    shown = validations[::-1][::every][::-1]
    rows = [["step", *(name.removeprefix("validation_").replace("_", " ") for name in names)]]
    rows.append(["---:"] * len(rows[0]))
    rows += [
        [str(v["step"]), *(f"{v.get(name, float('nan')):.5g}" for name in names)] for v in shown
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
