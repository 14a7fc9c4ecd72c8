"""The command line: one clear line and status 2 for every mistake, nothing overwritten."""

import re
import shlex

import pytest
from PIL import Image
from tiny_base import build_parts, write_tiny_base

import imprompt
from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.checkpoints import save_adapter
from imprompt.cli.generate import _identities, _image_prompts, _lowered, _published_guidance
from imprompt.cli.main import VERBS, create_parser, main
from imprompt.core.errors import ImpromptError
from imprompt.generation import published_guidance


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_tiny_base(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_file(base_folder, tmp_path_factory):
    base = load_base(base_folder)
    adapter = create_adapter(base.unet, feature_dim=base.image_encoder.embed_dim)
    file = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    save_adapter(adapter, file)
    return file


def refused(capsys, *arguments):
    """The one line that a mistake is told in."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("imprompt: error: ")]
    assert len(lines) == 1 and "Traceback" not in output.err
    return lines[0]


def test_every_verb_has_help_with_examples(capsys):
    for verb in VERBS:
        name = verb.__name__.rsplit(".", 1)[1]
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0
        assert "examples:" in capsys.readouterr().out


def test_generate_with_an_image_and_a_sweep(base_folder, adapter_file, tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.png")
    arguments = ["generate", "a cat", "--image", tmp_path / "photo.png", "--base", base_folder]
    arguments += ["--adapter", adapter_file, "--steps", 2, "--num-images", 2, "--sweep", 0, 0.5, 1]
    arguments += ["--output", tmp_path / "out.png", "--separate"]
    assert main([str(argument) for argument in arguments]) == 0
    label_height = 14
    assert Image.open(tmp_path / "out.png").size == (2 * 32, 3 * (32 + label_height))
    written = [
        Image.open(tmp_path / name).info["parameters"] for name in ("out.png", "out-003.png")
    ]
    assert written[0] == (
        "a cat\nSteps: 2, Sampler: ddim, CFG scale: 7.5, Seed: 0, Size: 32x32, "
        "Model: tiny, Adapter: adapter.safetensors, Scale: 0 0.5 1"
    )
    assert written[1].endswith("Scale: 0.5")
    command = shlex.join(map(str, ["imprompt", *arguments]))
    assert Image.open(tmp_path / "out-003.png").info["imprompt"] == command
    assert len(list(tmp_path.glob("out-*.png"))) == 6


def test_a_text_stands_alone_and_in_quotes(capsys):
    assert "stands without an option, in quotes" in refused(
        capsys, "generate", "--prompt", "a boat"
    )
    assert "of several words stands in quotes" in refused(capsys, "generate", "a", "boat")


def test_what_there_is_can_be_listed():
    assert {"generate", "load_base", "ImagePrompt", "Sampler"} <= set(dir(imprompt))


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    command = ["diorama", "--grid", str(sheet), "--count", "2", "--size-px", "16"]
    assert main(command) == 0
    before = sheet.read_bytes()
    assert "--overwrite" in refused(capsys, *command)
    assert sheet.read_bytes() == before
    assert main([*command, "--overwrite"]) == 0


def test_inspect_says_what_a_file_is(adapter_file, capsys):
    assert main(["inspect", str(adapter_file)]) == 0
    told = capsys.readouterr().out
    assert "variant" in told and "base" in told and "parameters" in told
    assert main(["inspect", "diorama"]) == 0
    assert re.search(r"^base +diorama \(text width 128\)$", capsys.readouterr().out, re.M)


def test_mistakes(base_folder, adapter_file, tmp_path, capsys):
    missing = tmp_path / "missing.png"
    assert "missing.png" in refused(capsys, "generate", "--image", missing)
    assert "no --image" in refused(capsys, "generate", "--adapter", adapter_file)
    assert "'nowhere'" in refused(capsys, "generate", "x", "--base", "nowhere")
    assert "missing.png" in refused(capsys, "inspect", missing)
    assert "not a kind" in refused(capsys, "diorama", "--grid", missing, "--kind", "dragon")
    assert "no source" in refused(capsys, "prepare", "nowhere", tmp_path / "data")
    assert "no prepared data" in refused(
        capsys, "train", "image-prompt", "--data", tmp_path, "--output", tmp_path / "run"
    )


IMAGE_OPTIONS = [
    ("--scale", "0"),
    ("--sweep", "0", "1"),
    ("--instruction", "use the style"),
    ("--instruction-guidance-scale", "2"),
    ("--published-guidance",),
    ("--merge", "mean"),
    ("--image-weights", "1"),
    ("--crop", "center"),
    ("--negative-image", "none.png"),
    ("--mask", "none.png"),
    ("--start", "0"),
    ("--end", "1"),
    ("--over-time", "1", "0"),
    ("--site-preset", "style"),
    ("--lora-scale", "1"),
    ("--shortcut-scale", "1"),
    ("--image-guidance-scale", "2"),
    ("--face-encoder", "diorama"),
    ("--image-encoder", "none"),
]


@pytest.mark.parametrize("option", IMAGE_OPTIONS, ids=lambda option: option[0])
def test_what_is_about_images_is_refused_without_one(option, capsys):
    line = refused(capsys, "generate", "x", "--base", "nowhere", *option)
    assert f"{option[0]} is about images, but no --image" in line


@pytest.mark.parametrize("option", ["--landmarks", "--identity-scale", "--identity-net"])
def test_what_is_about_a_person_is_refused_without_one(option, capsys):
    line = refused(capsys, "generate", "x", "--base", "nowhere", option, "1")
    assert f"{option} is about a person, but no --identity" in line


def test_published_guidance_goes_with_no_other(capsys):
    command = ["generate", "--image", "a.png", "--instruction", "use the style"]
    command += ["--base", "nowhere", "--published-guidance"]
    for option in ("--guidance-scale", "--image-guidance-scale", "--instruction-guidance-scale"):
        assert f"leave it or {option} out" in refused(capsys, *command, option, "5")


def test_an_adapter_of_another_base_is_refused(adapter_file, tmp_path, capsys):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.png")
    arguments = ["generate", "--image", tmp_path / "photo.png", "--adapter", adapter_file]
    line = refused(capsys, *arguments, "--output", tmp_path / "out.png")
    assert "adapter" in line and not (tmp_path / "out.png").exists()


def test_training_names_the_nearest_setting_and_system(base_folder, tmp_path, capsys):
    base = ["--base", base_folder]
    assert main([str(a) for a in ("prepare", "diorama:6", tmp_path / "data", *base)]) == 0
    train = ["--data", tmp_path / "data", "--output", tmp_path / "run", *base]
    line = refused(capsys, "train", "image-prompt", *train, "--set", "train.stepz=3")
    assert "train.steps" in line
    assert "text-to-image" in refused(capsys, "train", "imageprompt", *train)
    assert "must be given" in refused(capsys, "train", "image-prompt", *train)
    assert "validation_rows" in refused(
        capsys, "train", "image-prompt", *train, "--set", "train.steps=3"
    )
    for option in ("--size-px", "--image-root", "--image-key", "--caption-key", "--face-encoder"):
        assert f"Leave {option} out" in refused(
            capsys, "train", "image-prompt", *train, option, "1"
        )
    settings = ["--set", "train.steps=3", "--set", "train.validation_rows=2"]
    arguments = ["train", "image-prompt", *train, *settings]
    assert main([str(argument) for argument in arguments]) == 0
    assert (tmp_path / "run/adapter.safetensors").is_file()
    assert (tmp_path / "run/config.toml").is_file()


@pytest.mark.parametrize("name", ["controlnet", "t2i-adapter", "image-prompt", "concatenation"])
def test_all_settings_of_a_system_are_told(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--settings", name])
    told = capsys.readouterr().out
    assert exit_.value.code == 0
    settings = [line for line in told.splitlines() if line.startswith(("system.", "train."))]
    assert any(line.startswith("train.learning_rate = 0.0001") for line in settings)
    lines = told.splitlines()
    assert all(lines[lines.index(setting) + 1].startswith("    ") for setting in settings)


def test_settings_of_no_system(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--settings", "controlnets"])
    assert exit_.value.code == 2 and "choose one of" in capsys.readouterr().err


def test_maps_are_drawn(tmp_path):
    command = ["diorama", "--count", "2", "--columns", "2", "--grid"]
    assert main([*command, str(tmp_path / "depth.png"), "--map", "depth"]) == 0
    assert Image.open(tmp_path / "depth.png").size == (128, 64)
    assert main([*command, str(tmp_path / "x.png"), "--map", "smell"]) == 2


def drawn_by(command, file):
    assert main([str(argument) for argument in (*command, "--output", file)]) == 0
    return Image.open(file).tobytes()


def test_a_base_computes_where_and_how_it_is_told(base_folder, tmp_path, capsys):
    command = ["generate", "a cat", "--base", base_folder, "--steps", 2, "--num-images", 1]
    full = drawn_by(command, tmp_path / "full.png")
    half = drawn_by([*command, "--dtype", "bfloat16"], tmp_path / "half.png")
    assert full != half
    prepare = ["prepare", "diorama:2", tmp_path / "data"]
    train = ["train", "image-prompt", "--data", tmp_path / "data", "--output", tmp_path / "run"]
    for verb in (command, prepare, ["evaluate"], train):
        line = refused(capsys, *verb, "--base", base_folder, "--device", "cuda:63")
        assert "cuda:63" in line and "here is: cpu" in line


def test_an_image_encoder_within_a_folder(tmp_path, adapter_file, capsys):
    """A base as the published ones are, without one of its own."""
    base, models = tmp_path / "base", tmp_path / "models"
    write_tiny_base(base, image_encoder=False)
    write_tiny_base(models)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.png")
    encoder = ["--image-encoder", f"{models}:image_encoder"]
    draw = ["generate", "--image", tmp_path / "photo.png", "--adapter", adapter_file]
    draw += ["--base", base, "--steps", 2, "--num-images", 1]
    assert "--image-encoder" in refused(capsys, *draw, "--output", tmp_path / "out.png")
    drawn_by([*draw, *encoder], tmp_path / "out.png")

    prepare = ["prepare", "diorama:6", tmp_path / "data", "--base", base]
    assert "--image-encoder" in refused(capsys, *prepare)
    assert main([str(argument) for argument in (*prepare, *encoder)]) == 0
    train = ["train", "image-prompt", "--data", tmp_path / "data", "--base", base, *encoder]
    train += ["--output", tmp_path / "run", "--set", "train.steps=1"]
    train += ["--set", "train.validation_rows=2"]
    assert main([str(argument) for argument in train]) == 0


@pytest.mark.parametrize("option", ["--output", "--explain", "--grid"])
def test_an_ending_that_is_no_picture_is_told_before_the_work(option, tmp_path, capsys):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.png")
    command = ["generate", "--image", tmp_path / "photo.png", "--base", "nowhere"]
    if option == "--grid":
        command = ["diorama", "--kind", "dragon"]
    for name in ("pictures", "pictures.txt", "pictures.psd"):
        line = refused(capsys, *command, option, tmp_path / name)
        assert name in line and ".png" in line


def test_a_picture_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    draw = ["diorama", "--count", 1, "--columns", 1, "--size-px", 16, "--grid"]
    assert "is a folder" in refused(capsys, *draw, tmp_path / "folder.png", "--overwrite")

    def no_room(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", no_room)
    assert "No space left" in refused(capsys, *draw, tmp_path / "other.png")


def test_separate_pictures_are_not_overwritten_and_nothing_is_drawn(tmp_path, capsys):
    (tmp_path / "out-001.png").write_bytes(b"mine")
    command = ["generate", "a cat", "--base", "nowhere", "--num-images", 2, "--separate"]
    line = refused(capsys, *command, "--output", tmp_path / "out.png")
    assert "out-001.png exists" in line


def test_published_guidance_never_flees_from_the_image():
    published = published_guidance("use the pose")
    assert [_lowered(scale, published) for scale in (0.0, 0.1, 1.0)] == [0, 0, 0.8]
    assert _lowered(0.1, None) == 0.1


def test_without_a_name_the_next_one_that_is_free_is_taken(
    base_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "a cat", "--base", str(base_folder), "--steps", "1", "--num-images", "1"]
    for name in ("images.png", "images-2.png"):
        assert main(command) == 0
        assert capsys.readouterr().out == f"1 image in {name}\n"
    (tmp_path / "images-3-000.png").write_bytes(b"mine")
    assert main([*command, "--separate", "--size-px", "16", "32"]) == 0
    assert Image.open("images-4.png").size == Image.open("images-4-000.png").size == (32, 16)
    before = (tmp_path / "images.png").read_bytes()
    assert "images.png exists" in refused(capsys, *command, "--output", "images.png")
    assert (tmp_path / "images.png").read_bytes() == before
    assert main([*command, "--seed", "1", "--overwrite"]) == 0
    assert (tmp_path / "images.png").read_bytes() != before


def test_published_guidance_is_one_for_all_instructions(capsys):
    command = ["generate", "--image", "a.png", "--published-guidance"]
    alike = [*command, "--instruction", "use the style", "--instruction", "use the face"]
    assert _published_guidance(create_parser().parse_args(alike), None) == published_guidance(
        "face"
    )
    other = [*command, "--instruction", "use the style", "--instruction", "use the pose"]
    with pytest.raises(ImpromptError, match="'use the style' than for 'use the pose'"):
        _published_guidance(create_parser().parse_args(other), None)


def test_several_persons(monkeypatch, tmp_path):
    for name in ("a.png", "b.png", "a.json", "b.json"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "png")
    monkeypatch.chdir(tmp_path)
    command = ["generate", "--identity", "a.png", "--identity", "b.png"]
    people = _identities(create_parser().parse_args(command))
    assert [person.landmarks for person in people] == [None, None]
    assert people[0].identity is people[1].identity
    command += ["--landmarks", "a.json", "--landmarks", "b.json", "--identity-scale", "0.5"]
    people = _identities(create_parser().parse_args(command))
    assert [(str(one.landmarks), one.scale) for one in people] == [("a.json", 0.5), ("b.json", 0.5)]


def test_the_weights_of_a_face_adapter_are_passed_on():
    adapter = create_adapter(
        build_parts()["unet"], "faceid-plus", feature_dim=6, id_dim=4, depth=1, lora_rank=2
    )
    adapter.image_proj.shortcut = True
    for options, weights in (
        ([], (1.0, 1.0)),
        (["--lora-scale", "0.4", "--shortcut-scale", "2"], (0.4, 2.0)),
    ):
        arguments = create_parser().parse_args(["generate", "--image", "a.png", *options])
        [prompt] = _image_prompts(arguments, [Image.new("RGB", (8, 8))], adapter, 1.0)
        assert (prompt.lora_scale, prompt.shortcut_scale) == weights
