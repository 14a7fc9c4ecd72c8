"""What the documents tell people to type exists, and what they point to is there."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from imprompt.checkpoints import shipped_controls
from imprompt.cli.main import create_parser, main
from imprompt.core.config import build, read_toml, with_settings
from imprompt.core.images import pixels_to_images
from imprompt.data.columns import default_columns
from imprompt.data.dataset import Columns
from imprompt.diorama import render, sample_scene
from imprompt.systems.catalogue import trainable
from imprompt.training.config import TrainConfig
from imprompt.training.run import PRESETS, preset_path, run_training

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks() -> list[list[str]]:
    """The commands of each example, without what launches them."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            matches = [re.match(r"\s*(?:torchrun .*-m )?(imprompt [^…]*)$", line) for line in lines]
            found.append([match[1].strip() for match in matches if match])
    return [block for block in found if block]


def commands() -> list[str]:
    return [command for block in blocks() for command in block]


@pytest.mark.parametrize("command", commands())
def test_commands_can_be_typed(command):
    arguments = shlex.split(command, comments=True)[1:]
    try:
        parsed = create_parser().parse_args(arguments)
    except SystemExit as ending:  # what only shows something ends at once
        assert ending.code == 0
        return
    if parsed.verb == "train":
        tables = with_settings(read_toml(preset_path(parsed.preset, parsed.system)), parsed.set)
        build(TrainConfig, tables["train"], "train.")
        _, options = trainable(parsed.system).load()
        build(options, tables.get("system", {}), "system.")


def test_what_an_example_prepares_is_what_it_trains_on():
    """Columns that the presets' systems read are among those that the example's first command writes."""
    read = {
        "image-prompt": {"image_embeds"},
        "instruct": {"condition_states", "instruction_ids"},
        "instruct-words": {"kept_ids"},
        "identity": {"id_embeds", "id_lengths", "landmarks"},
        "face-id": {"id_embeds"},
        "controlnet": {"latent_mean"},
        "t2i-adapter": {"latent_mean"},
    }
    seen = 0
    for block in blocks():
        written: dict[str, set[str]] = {}
        for command in block:
            arguments = shlex.split(command, comments=True)[1:]
            if arguments[0] not in ("prepare", "train") or "--settings" in arguments:
                continue
            parsed = create_parser().parse_args(arguments)
            if parsed.verb == "prepare":
                columns = parsed.columns or default_columns(parsed.variant)
                written.setdefault(str(parsed.output), set()).update(columns)
            elif set(parsed.data) <= set(written):
                seen += 1
                for data in parsed.data:
                    assert read.get(parsed.system, set()) <= written[data], command
    assert seen >= 5


def test_there_are_commands_to_type():
    assert len(commands()) > 8


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.toml")), ids=lambda path: path.stem)
def test_presets_fit_their_systems(preset):
    tables = read_toml(preset)
    build(TrainConfig, tables["train"], "train.")
    name = preset.stem.removeprefix("diorama-")
    others = {
        "shipped": "image-prompt",
        "contrastive-persons": "contrastive",
        "instruct-layouts": "instruct-words",
        "instruct-drawn": "instruct",
        "text-to-image-portraits": "text-to-image",
    }
    _, options = trainable(others.get(name, name)).load()
    build(options, tables.get("system", {}), "system.")


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", (ROOT / "README.md").read_text()):
        assert f"\n{target}:" in makefile, target


def test_what_the_document_on_image_prompts_shows_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    for number, name in enumerate(("photo", "a", "b", "c", "left")):
        pixels = render([sample_scene(number)]).pixels
        pixels_to_images(pixels)[0].save(f"{name}.png")
    text = (ROOT / "docs" / "image-prompts.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, names)
    assert (tmp_path / "where.png").is_file() and (tmp_path / "photo.safetensors").is_file()
    heat = names["heat"]
    assert isinstance(heat, torch.Tensor) and heat.shape == (1, 64, 64)


def test_the_lessons_that_the_document_on_instruct_makes_are_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number, shape in enumerate([(64, 64), (80, 64)]):
        picture = pixels_to_images(render([sample_scene(number)]).pixels)[0]
        picture.resize(shape).save(f"photos/{number}.png")
        Path(f"photos/{number}.txt").write_text(f"caption {number}")
    # No control for edges comes with the package; another one stands in for what was trained.
    Path("runs/edges").mkdir(parents=True)
    Path("runs/edges/control").symlink_to(shipped_controls()["segmentation"])
    text = (ROOT / "docs" / "instruct.md").read_text()
    [block] = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "write_lessons" in b]
    names: dict[str, object] = {}
    exec(block.replace("steps=20", "steps=2"), names)
    [command] = [c for c in commands() if c.startswith("imprompt prepare lessons/") and "own/" in c]
    main(shlex.split(command)[1:])
    data = Columns.open("own")
    assert len(data) == 6
    settings = ["system.resampler_dim=64", "system.depth=1", "train.steps=2", "train.batch_size=2"]
    adapter = run_training(
        "instruct",
        data="own",
        base="diorama",
        output=tmp_path / "trained",
        settings=[*settings, "train.validation_rows=2"],
    )
    assert adapter.is_file()


@pytest.mark.parametrize(("preset", "samples"), [("image-prompt", 64), ("instruct", 512)])
def test_published_batches_are_whole_and_their_parts_fit_a_card(preset, samples):
    train = read_toml(PRESETS / f"{preset}.toml")["train"]
    assert train["batch_size"] == samples  # of all processes together
    assert train["batch_size"] == 8 * train["gradient_accumulation_steps"]
