"""Stable Diffusion XL is told of every picture how large it was and which part of it is shown."""

import io
import tarfile

import pytest
import torch
from PIL import Image
from tiny_base import build_parts, write_tiny_base, write_tiny_xl_base

from imprompt.bases import ClipImageEncoder, load_base
from imprompt.bases.stable_diffusion_xl import whole_picture
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.columns import default_columns, with_framing
from imprompt.data.dataset import Columns
from imprompt.data.joined import JoinedColumns
from imprompt.data.on_the_fly import PairsOnTheFly
from imprompt.data.prepare import prepare
from imprompt.training.run import prepare_run, run_training

VARIANTS = (
    "base",
    "plus",
    "full",
    "instruct",
    "instruct-words",
    "faceid",
    "faceid-plus",
    "identity",
)
LATENTS = ("latent_mean", "latent_logvar", "text_ids")
# Width and height; the tiny base's pictures are squares of 32.
PHOTOS = {"broad": (50, 30), "high": (30, 50), "square": (64, 64)}
FRAMINGS = [[30, 50, 0, 10, 32, 32], [50, 30, 10, 0, 32, 32], [64, 64, 0, 0, 32, 32]]
WHOLE = whole_picture(32, 32)[0].tolist()


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    return write_tiny_xl_base(tmp_path_factory.mktemp("base") / "tiny-xl")


@pytest.fixture
def xl(xl_folder):
    base = load_base(xl_folder)
    base.image_encoder = ClipImageEncoder(build_parts()["image_encoder"])
    return base


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, size in PHOTOS.items():
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("cat")
    return folder


def seen_of_framing(system, batch):
    """What the UNet reads of framing in a training step."""
    seen = []

    def look(_, arguments, named):
        seen.append(named["added_cond_kwargs"]["time_ids"].tolist())

    hook = system.base.unet.register_forward_pre_hook(look, with_kwargs=True)
    count = len(batch["text_ids"])
    loss, _ = system.loss(batch, Randomness(0, range(count)))
    loss.backward()
    hook.remove()
    (once,) = seen
    return once


def system_on(name, base, data, *settings):
    return prepare_run(
        name, base, data, None, ["train.steps=1", "train.validation_rows=0", *settings]
    )[0]


def test_prepared_data_say_what_was_cut_out(xl, photos, tmp_path):
    data = Columns.open(prepare(str(photos), tmp_path / "data", xl))
    assert set(data.names) == {*default_columns("base"), "framing"}
    framing = data.rows(range(3), ["framing"])["framing"]
    assert framing.dtype == torch.float32 and framing.tolist() == FRAMINGS
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, arcname="")
    archived = prepare(str(tmp_path / "photos.tar"), tmp_path / "archived", xl)
    assert Columns.open(archived).rows(range(3), ["framing"])["framing"].tolist() == FRAMINGS


def test_a_turned_photo_is_as_a_person_sees_it(xl, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    (tmp_path / "photos").mkdir()
    file = io.BytesIO()
    Image.effect_noise((50, 30), 80).save(file, "JPEG", exif=exif)
    (tmp_path / "photos/turned.jpg").write_bytes(file.getvalue())
    (tmp_path / "photos/turned.txt").write_text("cat")
    data = PairsOnTheFly(str(tmp_path / "photos"), xl)
    assert data.rows([0], ["framing"])["framing"].tolist() == [FRAMINGS[1]]


def test_scenes_are_whole(xl, tmp_path):
    data = Columns.open(prepare("diorama:2", tmp_path / "data", xl))
    assert data.rows([0, 1], ["framing"])["framing"].tolist() == [WHOLE] * 2


@pytest.mark.parametrize("is_prepared", [True, False])
def test_a_training_step_sees_it(xl, photos, tmp_path, is_prepared):
    data = PairsOnTheFly(str(photos), xl)
    if is_prepared:
        data = Columns.open(prepare(str(photos), tmp_path / "data", xl))
    system = system_on("image-prompt", xl, data)
    batch = data.rows([2, 0, 1], system.columns)
    assert seen_of_framing(system, batch) == [FRAMINGS[2], FRAMINGS[0], FRAMINGS[1]]


@pytest.mark.parametrize(
    ("name", "source", "columns", "settings"),
    [
        ("image-prompt", "diorama:3", default_columns("plus"), ["system.variant=plus"]),
        ("concatenation", "diorama:3", default_columns("base"), []),
        ("controlnet", "diorama:3", (*LATENTS, "control_depth"), ["system.kind=depth"]),
        ("instruct", "diorama-instruct:3", default_columns("instruct"), ["system.depth=1"]),
        ("face-id", "diorama-people:3", default_columns("faceid"), ["system.lora_rank=2"]),
        ("identity", "diorama-people:3", default_columns("identity"), ["system.depth=1"]),
    ],
)
def test_every_system_hands_it_on(xl, tmp_path, name, source, columns, settings):
    data = Columns.open(prepare(source, tmp_path / "data", xl, columns=columns))
    system = system_on(name, xl, data, *settings)
    batch = data.rows(range(3), system.columns)
    batch["framing"] = torch.tensor(FRAMINGS, dtype=torch.float32)
    assert seen_of_framing(system, batch) == FRAMINGS
    figures = system.validate(batch, Randomness(0, range(3)))
    system.rows_at_once = 2
    assert system.validate(batch, Randomness(0, range(3))) == pytest.approx(figures, rel=1e-4)


def test_a_controlnet_sees_it_too(xl, tmp_path):
    columns = (*LATENTS, "control_depth")
    data = Columns.open(prepare("diorama:3", tmp_path / "data", xl, columns=columns))
    system = system_on("controlnet", xl, data, "system.kind=depth")
    batch = data.rows(range(3), system.columns)
    batch["framing"] = torch.tensor(FRAMINGS, dtype=torch.float32)
    seen = []
    system.module.register_forward_pre_hook(
        lambda _, arguments, named: seen.append(named["added_cond_kwargs"]["time_ids"].tolist()),
        with_kwargs=True,
    )
    system.loss(batch, Randomness(0, range(3)))
    assert seen == [FRAMINGS]


def test_data_without_it_show_whole_pictures(xl, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(type(xl), "reads_framing", False)
    data = Columns.open(prepare(str(photos), tmp_path / "old", xl))
    monkeypatch.undo()
    assert "framing" not in data.names
    system = system_on("image-prompt", xl, data)
    assert seen_of_framing(system, data.rows(range(3), system.columns)) == [WHOLE] * 3
    # Of several folders all must have it.
    both = JoinedColumns([data, Columns.open(prepare(str(photos), tmp_path / "new", xl))])
    assert "framing" not in system_on("image-prompt", xl, both).columns
    # The same command again adds it.
    prepare(str(photos), tmp_path / "old", xl)
    data = Columns.open(tmp_path / "old")
    assert data.rows(range(3), ["framing"])["framing"].tolist() == FRAMINGS


def test_a_run_that_was_begun_without_it_does_not_go_on_with_it(xl, photos, tmp_path, monkeypatch):
    def run():
        settings = ["train.steps=1", "train.batch_size=2", "train.validation_rows=1"]
        return run_training(
            "image-prompt",
            data=tmp_path / "data",
            base=xl,
            output=tmp_path / "run",
            settings=settings,
        )

    with monkeypatch.context() as patch:
        patch.setattr(type(xl), "reads_framing", False)
        prepare(str(photos), tmp_path / "data", xl)
    run()
    prepare(str(photos), tmp_path / "data", xl)
    with pytest.raises(ImpromptError, match="framing was None, now True"):
        run()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_it_where_the_base_reads_it(xl, variant):
    columns = default_columns(variant)
    assert with_framing(xl, columns) == (*columns, "framing")
    assert with_framing(xl, (*columns, "framing")) == (*columns, "framing")
    assert with_framing(xl, ("pixels", "labels")) == ("pixels", "labels")


def test_other_bases_are_as_they_were(photos, tmp_path):
    base = load_base(write_tiny_base(tmp_path / "base"))
    data = Columns.open(prepare(str(photos), tmp_path / "data", base))
    assert set(data.names) == set(default_columns("base"))
    for rows in (data, PairsOnTheFly(str(photos), base)):
        system = system_on("image-prompt", base, rows)
        assert system.columns == ("latent_mean", "latent_logvar", "image_embeds", "text_ids")
