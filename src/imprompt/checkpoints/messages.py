"""What an error says of a file's content: names from a file are strangers' words, so they are cut
and made printable before they reach a terminal."""

from collections.abc import Sequence

MAX_ITEM = 90  # characters
MAX_LIST = 170


def one_line(text: str, limit: int = MAX_ITEM) -> str:
    """Text without line breaks and control characters, the middle left out where it is long."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    if len(line) <= limit:
        return line
    return f"{line[: limit * 2 // 3]}…{line[-(limit // 3) :]}"


def listed(items: Sequence[str], limit: int = 5) -> str:
    """The first few of a list."""
    shown: list[str] = []
    for item in items[:limit]:
        shown.append(one_line(item))
        if sum(map(len, shown)) > MAX_LIST:
            break
    rest = len(items) - len(shown)
    return (", ".join(shown) or "nothing") + (f" and {rest} more" if rest else "")
