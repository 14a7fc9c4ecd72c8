"""ControlNet and T2I-Adapter as systems: what trains, what begins at zero, what stock pipelines load."""

import json

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from tiny_base import write_tiny_base, write_tiny_xl_base

from imprompt.bases import load_base
from imprompt.checkpoints import load_control
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns
from imprompt.data.prepare import prepare
from imprompt.systems import controlnet, t2i_adapter
from imprompt.systems.controlnet import ControlNetOptions
from imprompt.systems.t2i_adapter import T2IAdapterOptions, layout_of
from imprompt.training.config import TrainConfig
from imprompt.training.loop import train

SYSTEMS = {
    "controlnet": (controlnet.build, ControlNetOptions, ControlNetModel),
    "t2i-adapter": (t2i_adapter.build, T2IAdapterOptions, T2IAdapter),
}
COLUMNS = ("latent_mean", "latent_logvar", "text_ids", "control_depth", "control_keypoints")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def base(base_folder):
    return load_base(base_folder)


@pytest.fixture(scope="module")
def columns(base_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls") / "data"
    prepare("diorama:10", folder, load_base(base_folder), columns=COLUMNS)
    return Columns.open(folder)


@pytest.fixture(params=list(SYSTEMS))
def kind_of_system(request):
    return SYSTEMS[request.param]


def system_of(base, columns, kind_of_system, **options):
    build, options_class, _ = kind_of_system
    return build(options_class(kind="depth", **options), base, columns)


def loss_of(system, columns, rows=range(6), samples=None):
    batch = columns.rows(rows, system.columns)
    return system.loss(batch, Randomness(0, rows if samples is None else samples))[0]


def test_exactly_the_control_trains(base, columns, kind_of_system):
    system = system_of(base, columns, kind_of_system)
    loss_of(system, columns).backward()
    assert isinstance(system.module, kind_of_system[2])
    assert all(p.grad is not None for p in system.module.parameters())
    assert all(p.grad is None for part in base.parts().values() for p in part.parameters())


def test_a_new_controlnet_adds_nothing_and_few_steps_change_that(base, columns):
    system = controlnet.build(ControlNetOptions(kind="depth"), base, columns)
    batch = columns.rows(range(6), system.columns)
    figures = system.validate(batch, Randomness(0, range(6)))
    assert figures["loss_with_control"] == figures["loss_without_control"]
    optimizer = torch.optim.Adam(system.module.parameters(), lr=1e-2)
    for _ in range(4):  # the entry is behind the zero convolutions, so it learns from the second
        loss_of(system, columns).backward()
        optimizer.step()
        optimizer.zero_grad()
    other = dict(batch, control_depth=255 - batch["control_depth"])
    losses = [system.loss(b, Randomness(0, range(6)))[0] for b in (batch, other)]
    assert losses[0] != losses[1]


def test_the_zero_entry_is_zero_only_if_wanted(base):
    for zero_entry in (True, False):
        model = controlnet.create_controlnet(base, zero_entry=zero_entry)
        assert (not model.controlnet_cond_embedding.conv_out.weight.any()) == zero_entry
        assert not model.controlnet_mid_block.weight.any()
        copied = model.mid_block.resnets[0].conv1.weight
        assert torch.equal(copied, base.unet.mid_block.resnets[0].conv1.weight)


def test_the_loss_of_a_sample_does_not_depend_on_its_batch(base, columns, kind_of_system):
    system = system_of(base, columns, kind_of_system, drop_text=0.5)
    together = loss_of(system, columns, range(4))
    alone = [loss_of(system, columns, [i]) for i in range(4)]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_half_of_the_prompts_are_dropped(base, columns):
    system = controlnet.build(ControlNetOptions(kind="depth"), base, columns)
    seen = []
    encode = base.encode_text
    base.encode_text = lambda ids: seen.append(ids) or encode(ids)
    batch = columns.rows([0] * 400, system.columns)
    system.loss(batch, Randomness(0, range(400)))
    empty = (seen[0] == base.tokenize([""])).all(1).float().mean().item()
    assert empty == pytest.approx(0.5, abs=0.08)


def test_early_steps_come_more_often(base, columns):
    system = t2i_adapter.build(T2IAdapterOptions(kind="depth"), base, columns)
    seen = []
    denoise = base.denoise
    base.denoise = lambda noisy, t, *a, **k: seen.append(t) or denoise(noisy, t, *a, **k)
    system.loss(columns.rows([0] * 400, system.columns), Randomness(0, range(400)))
    assert seen[0].float().mean().item() == pytest.approx(750, abs=25)
    assert seen[0].max() <= 999


def test_what_is_trained_loads_in_diffusers_and_here(base, columns, kind_of_system, tmp_path):
    system = system_of(base, columns, kind_of_system)
    config = TrainConfig(steps=2, batch_size=2, validation_rows=2, learning_rate=1e-3)
    folder = train(system, columns, config, tmp_path / "run", export_name="control")
    stock = kind_of_system[2].from_pretrained(folder)
    trained = system.module.state_dict()
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(value.float(), trained[name], rtol=1e-3, atol=1e-3)
    assert trained[name].dtype == torch.float32
    loaded = load_control(folder)
    assert loaded.kind == "depth"
    assert json.loads((folder / "control.json").read_text())["base"] == base.name
    going_on = system_of(base, columns, kind_of_system, start_from=str(folder))
    assert all(p.requires_grad for p in going_on.module.parameters())


def test_a_t2i_adapter_that_reads_grey_goes_on(base, columns, tmp_path):
    """As the published ones for edges and sketches."""
    config = t2i_adapter.create_t2i_adapter(base).config
    names = ("channels", "num_res_blocks", "downscale_factor", "adapter_type")
    grey = T2IAdapter(in_channels=1, **{name: config[name] for name in names})
    grey.save_pretrained(tmp_path / "grey")
    options = T2IAdapterOptions(kind="depth", start_from=str(tmp_path / "grey"))
    system = t2i_adapter.build(options, base, columns)
    loss_of(system, columns).backward()
    batch = columns.rows(range(6), system.columns)
    assert system.maps(batch).shape[1] == 1
    torch.testing.assert_close(
        system.maps(batch)[:, 0], batch["control_depth"].float().mean(1) / 255
    )


def test_mistakes_are_told(base, columns, kind_of_system, tmp_path):
    build, options, _ = kind_of_system
    with pytest.raises(ImpromptError, match=r"system\.kind=KIND.*depth, keypoints"):
        build(options(), base, columns)
    with pytest.raises(ImpromptError, match="control_edges"):
        build(options(kind="edges"), base, columns)
    with pytest.raises(ImpromptError, match="no control"):
        build(options(kind="depth", start_from=str(tmp_path)), base, columns)
    other = load_base(write_tiny_base(tmp_path / "other", seed=1))
    with pytest.raises(ImpromptError, match="prepared with"):
        build(options(kind="depth"), other, columns)


def test_a_unet_without_a_t2i_adapter(tmp_path):
    with pytest.raises(ImpromptError, match="no T2I-Adapter"):
        layout_of(load_base(write_tiny_xl_base(tmp_path / "xl")))


def test_a_controlnet_of_the_xl_kind(tmp_path):
    base = load_base(write_tiny_xl_base(tmp_path / "xl"))
    prepare("diorama:4", tmp_path / "data", base, columns=COLUMNS)
    columns = Columns.open(tmp_path / "data")
    system = controlnet.build(ControlNetOptions(kind="depth"), base, columns)
    loss_of(system, columns, range(4)).backward()
    assert all(p.grad is not None for p in system.module.parameters())


def test_a_start_made_for_another_base_is_told(base, columns, kind_of_system, tmp_path):
    other = load_base("diorama")
    create = {"ControlNetModel": controlnet.create_controlnet}.get(
        kind_of_system[2].__name__, t2i_adapter.create_t2i_adapter
    )
    create(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ImpromptError, match="made for another base: its"):
        system_of(base, columns, kind_of_system, start_from=str(tmp_path / "other"))
