"""The one exception a user's mistake raises."""


class ImpromptError(Exception):
    """A mistake of the caller: one line that says what was given, what is allowed, what to do."""


def first_line(error: Exception) -> str:
    """What an error says, short enough to be quoted within another."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
