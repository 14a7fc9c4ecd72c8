"""Tests that take minutes or gigabytes: they run with IMPROMPT_SLOW_TESTS=1, as `make test-slow` sets it."""

import os

import pytest

SLOW_TESTS = os.environ.get("IMPROMPT_SLOW_TESTS") == "1"


def needs_slow_tests(why: str) -> pytest.MarkDecorator:
    """A mark that skips a test unless slow ones are wanted; `why` says what it takes."""
    return pytest.mark.skipif(not SLOW_TESTS, reason=f"{why}; set IMPROMPT_SLOW_TESTS=1")
