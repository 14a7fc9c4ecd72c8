"""ControlNet and T2I-Adapter of Stable Diffusion 1.5's and XL's size: shapes on the meta device, and
(with IMPROMPT_SLOW_TESTS=1) three real steps of the one training loop on random weights."""

import pytest
import torch
from full_size_base import full_size_base
from slow import needs_slow_tests

from imprompt.data.dataset import Columns, ColumnsWriter
from imprompt.systems import controlnet, t2i_adapter
from imprompt.systems.controlnet import ControlNetOptions, control_residuals, create_controlnet
from imprompt.systems.t2i_adapter import T2IAdapterOptions, adapter_residuals, create_t2i_adapter
from imprompt.training.config import TrainConfig
from imprompt.training.loop import train


@pytest.mark.parametrize(
    ("is_xl", "num_controlnet", "num_adapter"),
    [(False, 361_279_120, 77_369_280), (True, None, 79_028_160)],
)
def test_shapes_at_full_size(is_xl, num_controlnet, num_adapter):
    base = full_size_base("meta", is_xl)
    with torch.device("meta"):
        network = create_controlnet(base)
        adapter = create_t2i_adapter(base)
    for model, wanted in ((network, num_controlnet), (adapter, num_adapter)):
        if wanted is not None:
            assert sum(p.numel() for p in model.parameters()) == wanted
    length = 154 if is_xl else 77
    states = base.encode_text(torch.zeros(2, length, dtype=torch.long, device="meta"))
    latents = torch.zeros(2, *base.latent_shape(), device="meta")
    maps = torch.zeros(2, 3, base.image_size_px, base.image_size_px, device="meta")
    timestep = torch.tensor(500, device="meta")
    from_controlnet = control_residuals(network, base, latents, timestep, states, maps)
    from_adapter = adapter_residuals(adapter, maps)
    both = type(from_adapter).sum([from_controlnet, from_adapter])
    assert base.denoise(latents, timestep, states, residuals=both).shape == latents.shape


@needs_slow_tests("takes minutes and 11 GB")
@pytest.mark.parametrize("name", ["controlnet", "t2i-adapter"])
def test_three_real_steps_at_full_size(name, tmp_path):
    base = full_size_base("cpu")
    base.tokenize = lambda texts: torch.full((len(texts), 77), 49407)
    base.fingerprint = lambda: "random"
    generator = torch.Generator().manual_seed(0)
    writer = ColumnsWriter(tmp_path / "data")
    (tmp_path / "data").mkdir()
    writer.write(
        0,
        {
            "latent_mean": torch.randn(4, 4, 16, 16, generator=generator).half(),
            "latent_logvar": torch.full((4, 4, 16, 16), -6.0).half(),
            "text_ids": torch.full((4, 77), 320),
            "control_depth": torch.randint(
                256, (4, 3, 128, 128), generator=generator, dtype=torch.uint8
            ),
        },
    )
    writer.finish(4, {"source": "noise", "base_fingerprint": "random"})
    columns = Columns.open(tmp_path / "data")
    if name == "controlnet":
        system = controlnet.build(ControlNetOptions(kind="depth"), base, columns)
    else:
        system = t2i_adapter.build(T2IAdapterOptions(kind="depth"), base, columns)
    before = {n: p.detach().clone() for n, p in system.module.named_parameters()}
    config = TrainConfig(steps=3, batch_size=1, validation_rows=1, checkpoint_every_steps=3)
    export = train(system, columns, config, tmp_path / "run", export_name="control")
    moved = [n for n, p in system.module.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == len(before)
    assert (export / "config.json").is_file()
