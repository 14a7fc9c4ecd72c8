"""The one exception a user's mistake raises."""


class ImpromptError(Exception):
    """A mistake of the caller: one line that says what was given, what is allowed, what to do."""
