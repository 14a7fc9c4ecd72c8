"""Scripts beside the package keep up with it."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py")) + sorted(BENCHMARKS.glob("accelerator/*.py"))


def loaded(script, monkeypatch):
    """A script as a module."""
    monkeypatch.setattr(sys, "path", [str(script.parent), str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_script_takes_from_the_package_is_there(script, monkeypatch):
    assert loaded(script, monkeypatch).__doc__


def test_the_table_of_instruct_says_between_what_its_layouts_lie(monkeypatch):
    benchmark = loaded(BENCHMARKS / "instruct.py", monkeypatch)
    figures = {f"{task}: {name}": 0.5 for task in benchmark.TASKS for name in benchmark.SCORES}
    figures["composition: layout IoU of true renders"] = 0.9
    without = benchmark.task_table(figures)
    assert without.endswith("reach a layout IoU of 90.0%.\n")
    figures["composition: layout IoU of the text alone"] = 0.6
    assert "90.0%; the text alone, without an image, gives 60.0%.\n" in benchmark.task_table(
        figures
    )
