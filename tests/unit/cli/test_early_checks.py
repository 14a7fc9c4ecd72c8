"""What shows in the words of a command alone is told before anything heavy is imported."""

import subprocess
import sys

import pytest

from imprompt.cli.main import main

HERE = __file__
PROBE = """
import sys
from imprompt.cli.main import main
assert main(sys.argv[1:]) == 2
heavy = {"torch", "diffusers", "transformers", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--image", "nothere.png"), "There is no image file nothere.png."),
        (("--identity", "nothere.png"), "There is no image file nothere.png."),
        (("--control", "depth=nothere.png:0.5"), "There is no image file nothere.png."),
        (("--control", "map.png"), "--control 'map.png' is not of the form KIND=FILE."),
        (("--control", "depth=map.png:nan"), "The weight in 'map.png:nan' is no finite number."),
        (("--lora", "nothere.safetensors:0.8"), "There is no LoRA nothere.safetensors."),
        (("--textual-inversion", "word.pt"), "There is no textual inversion word.pt."),
        (("--sampler", "dpmpp_2m"), "choose from 'ddim'"),
        (("--steps", "0"), "--steps: 0 was given, but must be at least 1"),
        (("--num-images", "two"), "--num-images: 'two' is no whole number"),
        (("--guidance-scale", "nan"), "--guidance-scale: 'nan' is no finite number"),
        (("--adapter", "a.bin"), "There is no adapter a.bin; diorama, diorama-instruct come with"),
        (("--adapter", "a.bin", "--adapter", "b.bin"), "--adapter was given twice"),
        (("--control-model", "edges=nothere"), "There is no control model nothere; diorama-depth"),
        (("--control-start", "0.5"), "--control-start is about controls, but no --control"),
        (("--strength", "0.5"), "--strength is about a picture to begin from, but no --init-image"),
        (("--init-image", "nothere.png"), "There is no image file nothere.png."),
        (("--size-px", "8", "8", "8"), "--size-px takes one side, or height and width"),
        (("--sweep", "0", "1", "--scale", "1"), "--sweep names all weights"),
        (
            ("--identity", HERE, "--landmarks", HERE, "--landmarks", HERE),
            "2 --landmarks were given",
        ),
        (("--sclae", "0.4"), "There is no option --sclae; did you mean --scale? (see"),
        (("-scale=0.4",), "There is no option -scale; did you mean --scale? (see"),
    ],
)
def test_one_line_of_a_mistake(options, told, capsys):
    image = ("--image", HERE) if {"--adapter", "--sweep"} & set(options) else ()
    line = refused(capsys, "generate", "x", *image, *options)
    assert line.startswith("imprompt: error: ") and told in line


def test_a_misspelt_option_is_told_before_a_missing_one(capsys):
    line = refused(capsys, "train", "image-prompt", "--daat", "data/")
    assert "did you mean --data?" in line and "`imprompt train --help`" in line
    assert "required: --data" in refused(capsys, "train", "image-prompt")
    assert "invalid choice: 'generat'" in refused(capsys, "generat")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("a.safetensors", "--what", "base"), "--what base does not look at a.safetensors"),
        (
            ("--map-reader", "a"),
            "--what adapter does not look at --map-reader: leave it out, or say",
        ),
        (
            ("--what", "instruct", "--face-encoder", "a"),
            "--face-encoder: leave it out, or say --what",
        ),
        (("--control-model", "depth=a"), "or say --what control."),
        (("--instructions", "a"), "or say --what instructions."),
    ],
)
def test_what_a_measurement_does_not_look_at(command, told, capsys):
    assert told in refused(capsys, "evaluate", *command)


def test_nothing_heavy_is_imported_for_it():
    for options in (["--image", "nothere.png"], ["--steps", "0"], ["--scale", "0.4"]):
        command = [sys.executable, "-c", PROBE, "generate", "x", *options]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_drawing_begins_with_a_line(capsys):
    assert main(["generate", "x", "--base", "nowhere", "--device", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("imprompt: loading…\n")


def test_without_a_control_the_networks_of_others_are_not_imported():
    probe = "import sys, imprompt.generation; assert 'diffusers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
