"""Tables, and where they stand in the documents: between <!-- NAME:begin --> and <!-- NAME:end -->."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
README, DOCS, RESULTS = ROOT / "README.md", ROOT / "docs", ROOT / "benchmarks" / "results"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def header(*cells: str) -> str:
    """A table's first two lines; all columns but the first hold numbers."""
    return row(*cells) + "|---|" + "---:|" * (len(cells) - 1) + "\n"


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a page.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")


def publish(page: Path, name: str, text: str) -> None:
    """Replace it on its own page, and on the page where all tables stand."""
    for one in (page, DOCS / "results.md"):
        put(one, name, text)
