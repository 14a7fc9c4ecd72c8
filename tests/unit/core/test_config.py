"""Settings: from presets and the command line to frozen dataclasses, mistakes named."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imprompt.core.config import build, read_toml, to_toml, with_settings
from imprompt.core.errors import ImpromptError


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int
    rate: float = 0.5
    name: str = "a"
    on: bool = False
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=lambda: Inner(steps=1))
    folder: Path | None = None


def test_settings_go_over_the_preset():
    tables = with_settings({"inner": {"steps": 3, "rate": 1}}, ["inner.rate=0.25", "folder=out/x"])
    made = build(Outer, tables)
    assert made == Outer(inner=Inner(steps=3, rate=0.25), folder=Path("out/x"))


def test_plain_words_need_no_quotes():
    made = build(Inner, with_settings({}, ["steps=2", "name=plus", "on=true", "sizes=[3]"]))
    assert made == Inner(steps=2, name="plus", on=True, sizes=(3,))


def test_the_nearest_name_is_told():
    with pytest.raises(ImpromptError, match=r"inner\.stepz; did you mean inner\.steps"):
        build(Outer, with_settings({}, ["inner.stepz=2"]))


@pytest.mark.parametrize("setting", ["steps=many", "steps=1.5", "steps=true", "on=1"])
def test_a_wrong_type_is_told(setting):
    with pytest.raises(ImpromptError, match="must be of type"):
        build(Inner, with_settings({"steps": 1}, [setting]))


@pytest.mark.parametrize("setting", ["steps", "=3", "a..b=1"])
def test_what_is_no_setting_is_told(setting):
    with pytest.raises(ImpromptError, match="name=value"):
        with_settings({}, [setting])


def test_what_must_be_given_is_told():
    with pytest.raises(ImpromptError, match="steps must be given"):
        build(Inner, {})


def test_written_and_read_again_it_is_the_same(tmp_path):
    original = Outer(inner=Inner(steps=7, name='a "b"\\c', sizes=(4, 5)))
    (tmp_path / "config.toml").write_text(to_toml(original))
    assert build(Outer, read_toml(tmp_path / "config.toml")) == original


def test_what_is_no_toml_is_told(tmp_path):
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ImpromptError, match="TOML"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(ImpromptError, match="no preset"):
        read_toml(tmp_path / "none.toml")


def test_settings_leave_the_tables_they_are_laid_over():
    tables = {"a": {"b": {"c": 1}}}
    assert with_settings(tables, ["a.b.c=2"]) == {"a": {"b": {"c": 2}}}
    assert tables == {"a": {"b": {"c": 1}}}
