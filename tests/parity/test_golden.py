"""Agreement with the authors' implementations, to float32 rounding.

The files in golden/ hold small random weights, inputs, and what the published code made of them;
golden/README.md says which code that was.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch.nn.functional import mse_loss

from imprompt.checkpoints import load_adapter, save_adapter

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["base", "plus", "full", "faceid", "faceid_plus", "faceid_plusv2", "instruct"]
SHORTCUT = {"faceid_plusv2": {"shortcut": True, "shortcut_scale": 0.7}}


@pytest.fixture(scope="module")
def unet():
    model = UNet2DConditionModel(**json.loads((GOLDEN / "unet_config.json").read_text()))
    model.load_state_dict(load_file(GOLDEN / "unet.safetensors"))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(params=NAMES)
def case(request):
    expected = load_file(GOLDEN / f"{request.param}.expected.safetensors")
    inputs = [expected[key] for key in sorted(expected) if key.startswith("input_")]
    adapter = load_adapter(GOLDEN / f"{request.param}.safetensors")
    return adapter, inputs, SHORTCUT.get(request.param, {}), expected


def denoise(unet, io, condition):
    return unet(io["sample"], io["timestep"], io["text"], cross_attention_kwargs=condition).sample


def test_bare_unet(unet, io):
    noise = denoise(unet, io, None)
    torch.testing.assert_close(noise, io["noise_pred_no_adapter"], atol=1e-5, rtol=0)


def test_tokens(case):
    adapter, inputs, options, expected = case
    tokens = adapter.tokens(*inputs, **options)
    torch.testing.assert_close(tokens, expected["tokens"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 0.6, 0.0])
def test_noise(unet, io, case, scale):
    adapter, inputs, options, expected = case
    with adapter.install(unet) as handle, torch.no_grad():
        noise = denoise(unet, io, handle.condition(adapter.tokens(*inputs, **options), scale))
    torch.testing.assert_close(noise, expected[f"noise_pred_scale_{scale}"], atol=1e-5, rtol=0)


def test_loss_and_gradients(unet, io, case):
    adapter, (first, *rest), options, expected = case
    dropped = first.clone()
    dropped[1] = 0
    with adapter.install(unet) as handle:
        condition = handle.condition(adapter.tokens(dropped, *rest, **options))
        loss = mse_loss(denoise(unet, io, condition), io["noise"])
    loss.backward()

    torch.testing.assert_close(
        loss.detach(), expected["loss_second_sample_dropped"], atol=0, rtol=1e-4
    )
    parameters = dict(adapter.named_parameters())
    wanted = {k.removeprefix("grad."): v for k, v in expected.items() if k.startswith("grad.")}
    assert wanted
    for key, gradient in wanted.items():
        actual = parameters[key].grad
        assert actual is not None, key
        deviation = (actual - gradient).norm() / gradient.norm()
        assert deviation < 1e-4, f"{key}: {deviation:.1e}"


@pytest.mark.parametrize("layout", ["native", "official"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_published(name, layout, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    save_adapter(load_adapter(GOLDEN / f"{name}.safetensors"), path, layout=layout)
    published, written = load_file(GOLDEN / f"{name}.safetensors"), load_file(path)
    assert written.keys() == published.keys()
    for key, tensor in published.items():
        assert torch.equal(written[key], tensor), key
    again = load_adapter(path)
    expected = load_file(GOLDEN / f"{name}.expected.safetensors")
    inputs = [expected[key] for key in sorted(expected) if key.startswith("input_")]
    tokens = again.tokens(*inputs, **SHORTCUT.get(name, {}))
    torch.testing.assert_close(tokens, expected["tokens"], atol=1e-5, rtol=0)


def test_the_second_generation_of_face_id_plus_is_known_again(tmp_path):
    for name, is_second in (("faceid_plus", False), ("faceid_plusv2", True)):
        adapter = load_adapter(GOLDEN / f"{name}.safetensors")
        assert adapter.image_proj.shortcut is is_second
        save_adapter(adapter, tmp_path / "renamed.safetensors")
        assert load_adapter(tmp_path / "renamed.safetensors").image_proj.shortcut is is_second
