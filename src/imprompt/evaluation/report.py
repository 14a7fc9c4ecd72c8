"""Self-contained HTML reports: sections of text, pictures, tables and charts, in one file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2026; --soft: #5b6270; --paper: #fbfaf7; --card: #ffffff;
  --line: #e3e0d8; --one: #c2410c; --two: #1d4ed8; --three: #15803d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e1; --soft: #9aa1ad; --paper: #14161a;
  --card: #1c1f25; --line: #30343c; --one: #fb923c; --two: #7aa2ff; --three: #4ade80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 34px; line-height: 1.15; margin: 0 0 8px; letter-spacing: -.02em; }
h2 { font-size: 21px; margin: 0 0 4px; }
p { margin: 0 0 14px; max-width: 72ch; } .soft { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 22px 24px; margin-top: 20px; overflow-x: auto; }
.numbers { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 22px; }
.number { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px 18px; flex: 1 1 140px; } .number b { display: block; font-size: 28px; line-height: 1.2;
  white-space: nowrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; }
.rows { border-spacing: 6px; border-collapse: separate; margin-left: -6px; }
.rows td, .rows th { padding: 0; border: 0; font-weight: 500; color: var(--soft); font-size: 14px; }
.rows th { padding-right: 10px; } .rows tr > th:first-child { width: 150px; min-width: 90px; }
img { display: block; border-radius: 6px; image-rendering: pixelated; width: 104px; height: 104px; }
pre { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; } svg { max-width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 13px; }
"""
_COLOURS = ("var(--one)", "var(--two)", "var(--three)")


@dataclass
class Report:
    """Build from top to bottom, then `write`."""

    title: str
    lead: str
    _parts: list[str] = field(default_factory=list)

    def numbers(self, figures: Mapping[str, str]) -> None:
        """Large figures in a row: what the reader should take away."""
        cells = "".join(
            f'<div class="number"><b>{html.escape(value)}</b><span class="soft">{html.escape(name)}</span></div>'
            for name, value in figures.items()
        )
        self._parts.append(f'<div class="numbers">{cells}</div>')

    def section(self, title: str, text: str, *contents: str) -> None:
        """A heading, a sentence on what one sees, and contents made by the functions below."""
        self._parts.append(
            f"<section><h2>{html.escape(title)}</h2><p class='soft'>{html.escape(text)}</p>"
            + "".join(contents)
            + "</section>"
        )

    def write(self, path: Path) -> None:
        """Write the page; nothing in it is loaded from elsewhere."""
        path.write_text(
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body><main>"
            f"<h1>{html.escape(self.title)}</h1><p class='soft'>{html.escape(self.lead)}</p>"
            + "".join(self._parts)
            + "</main></body></html>\n",
            encoding="utf-8",
        )


def picture(image: Image.Image, alt: str = "") -> str:
    """An image inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" title="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def picture_rows(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], header: Sequence[str] = ()
) -> str:
    """Labelled rows of pictures; `header` names the columns."""
    head = ""
    if header:
        cells = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *header))
        head = f"<tr>{cells}</tr>"
    body = "".join(
        f"<tr><th>{html.escape(label)}</th>"
        + "".join(f"<td>{picture(i, label)}</td>" for i in images)
        + "</tr>"
        for label, images in rows
    )
    return f'<table class="rows">{head}{body}</table>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i else ''}>{html.escape(v)}</{tag}>"
            for i, v in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', header)}</tr>{body}</table>"


def commands(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], *, x_name: str, as_percent: bool = False
) -> str:
    """Lines over a common x axis, drawn as SVG, with a legend."""
    width, height, left, bottom, top, right = 640, 300, 56, 44, 16, 170
    points = [point for line in lines.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = (0.0, 1.0) if as_percent else _padded(min(ys), max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return left + across * (width - left - right), height - bottom - up * (
            height - bottom - top
        )

    parts = []
    for i in range(5):
        value = y_low + (y_high - y_low) * i / 4
        _, y = at(x_low, value)
        label = f"{value:.0%}" if as_percent else f"{value:.3f}"
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for x_value in sorted({x_low, (x_low + x_high) / 2, x_high}):
        x, _ = at(x_value, y_low)
        parts.append(
            f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{x_value:g}</text>'
        )
    middle = (left + width - right) / 2
    parts.append(
        f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{html.escape(x_name)}</text>'
    )
    for index, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
        )
        parts += [
            f'<circle cx="{at(*p)[0]:.1f}" cy="{at(*p)[1]:.1f}" r="3.5" fill="{colour}"/>'
            for p in (line if len(line) < 16 else ())
        ]
        y = top + 14 + index * 24
        parts.append(
            f'<rect x="{width - right + 14}" y="{y - 9}" width="14" height="4" rx="2" fill="{colour}"/>'
            f'<text x="{width - right + 34}" y="{y}">{html.escape(name)}</text>'
        )
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(parts)}</svg>'


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.1 or 0.01
    return low - margin, high + margin
