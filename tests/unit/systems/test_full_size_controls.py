"""ControlNet and T2I-Adapter of Stable Diffusion 1.5's and XL's size: shapes on the meta device, and
(with IMPROMPT_SLOW_TESTS=1) three real steps of the one training loop on random weights."""

import pytest
import torch
from full_size_base import (
    LATENT_SIDE,
    full_size_base,
    learns_in_three_steps,
    prepared,
    untrained,
)
from slow import needs_slow_tests

from imprompt.systems import controlnet, t2i_adapter
from imprompt.systems.controlnet import ControlNetOptions, control_residuals, create_controlnet
from imprompt.systems.t2i_adapter import T2IAdapterOptions, adapter_residuals, create_t2i_adapter


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


@pytest.mark.slow
@needs_slow_tests("takes minutes and 11 GB")
@pytest.mark.parametrize("name", ["controlnet", "t2i-adapter"])
def test_three_real_steps_at_full_size(name, tmp_path, monkeypatch):
    untrained(monkeypatch)
    base = full_size_base("cpu")
    maps = torch.randint(256, (4, 3, 8 * LATENT_SIDE, 8 * LATENT_SIDE), dtype=torch.uint8)
    columns = prepared(tmp_path / "data", control_depth=maps)
    if name == "controlnet":
        system = controlnet.build(ControlNetOptions(kind="depth"), base, columns)
    else:
        system = t2i_adapter.build(T2IAdapterOptions(kind="depth"), base, columns)
    export = learns_in_three_steps(system, columns, tmp_path / "run")
    assert (export / "config.json").is_file()
