"""Image prompts on a CUDA device: the same results, nothing that waits, nothing computed twice."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from PIL import Image
from tiny_base import TEXT_DIM, build_parts

import imprompt
from imprompt.adapters import attention_sites, combine, create_adapter
from imprompt.core.shipped import ADAPTERS, shipped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def unet():
    return build_parts()["unet"].to(DEVICE)


def inputs_on(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(device, dtype)
    text = torch.randn(2, 7, TEXT_DIM, generator=generator).to(device, dtype)
    return latents, torch.tensor([500, 500], device=device), text


def installed(unet):
    return create_adapter(unet, "base", feature_dim=6).to(unet.dtype).install(unet)


def condition_of(handle, scale=0.7):
    """Two prompts, in two halves of the picture."""
    weight = next(iter(handle.weights.values())).to_k_ip.weight
    tokens = torch.randn(2, 2, 3, TEXT_DIM, generator=torch.Generator().manual_seed(2)).to(weight)
    mask = torch.zeros(32, 32).to(weight)
    mask[:, :16] = 1
    return combine(
        *(
            handle.condition(own, scale, where)
            for own, where in zip(tokens, (mask, 1 - mask), strict=True)
        )
    )


@torch.no_grad()
def test_same_as_on_the_cpu():
    outputs = []
    for device in ("cpu", DEVICE):
        unet = build_parts()["unet"].to(device)
        inputs = inputs_on(device)
        handle = installed(unet)
        [condition] = handle.prepare([condition_of(handle)], inputs[2], (8, 8))
        outputs.append(unet(*inputs, cross_attention_kwargs=condition).sample.cpu())
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_what_is_prepared_changes_nothing(unet, dtype):
    unet.to(dtype)
    inputs, handle = inputs_on(DEVICE, dtype), installed(unet)
    plain = condition_of(handle)
    [prepared] = handle.prepare([plain], inputs[2], (8, 8))
    expected = unet(*inputs, cross_attention_kwargs=plain).sample
    assert torch.equal(unet(*inputs, cross_attention_kwargs=prepared).sample, expected)


@torch.no_grad()
def test_a_step_never_waits_for_the_device(unet):
    inputs, handle = inputs_on(DEVICE), installed(unet)
    [condition] = handle.prepare([condition_of(handle)], inputs[2], (8, 8))
    unet(*inputs, cross_attention_kwargs=condition)
    torch.cuda.set_sync_debug_mode("error")
    try:
        unet(*inputs, cross_attention_kwargs=condition)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_adapter_follows_the_base_to_its_device():
    base = imprompt.load_base("diorama", device=DEVICE)
    adapter = imprompt.load_adapter(shipped(ADAPTERS["diorama"]))
    prompt = imprompt.ImagePrompt(Image.new("RGB", (64, 64), "red"), adapter=adapter)
    imprompt.generate(base, "", prompt, steps=2, progress=False)
    assert next(adapter.parameters()).device.type == DEVICE


@torch.no_grad()
def test_text_stays_known_under_offloading(unet):
    from accelerate import cpu_offload_with_hook

    inputs, handle = inputs_on(DEVICE), installed(unet)
    plain = condition_of(handle)
    expected = unet(*inputs, cross_attention_kwargs=plain).sample
    [condition] = handle.prepare([plain], inputs[2], (8, 8))
    counts = Counter()
    for site in attention_sites(unet):
        if site.is_cross:
            site.module.to_k.register_forward_hook(lambda *_: counts.update("k"))
    _, hook = cpu_offload_with_hook(unet, torch.device(DEVICE))
    hook.offload()
    assert torch.equal(unet(*inputs, cross_attention_kwargs=condition).sample, expected)
    assert not counts


COMPILED = """
import torch
from tiny_base import TEXT_DIM, build_parts
from imprompt.adapters import create_adapter
device = "DEVICE"
unet = build_parts()["unet"].to(device)
handle = create_adapter(unet, "base", feature_dim=6).install(unet)
latents, text, tokens = (
    torch.randn(shape, device=device) for shape in ((2, 4, 8, 8), (2, 7, TEXT_DIM), (1, 3, TEXT_DIM))
)
mask = torch.ones(8, 8, device=device)
compiled = torch.compile(unet, fullgraph=True)
with torch.no_grad():
    for scale in (1.0, 0.6, 0.3):
        [condition] = handle.prepare([handle.condition(tokens, scale, mask)], text, (8, 8))
        for timestep in (900, 100):
            inputs = latents, torch.tensor(timestep, device=device), text
            expected = unet(*inputs, cross_attention_kwargs=condition).sample
            actual = compiled(*inputs, cross_attention_kwargs=condition).sample
            torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-2)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
"""


def test_compiled_once_for_all_steps_and_scales(request):
    # In a process of its own, where no runtime type checks stand between the compiler and the code.
    root = request.config.rootpath
    path = f"{root / 'src'}:{root / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [sys.executable, "-c", COMPILED.replace("DEVICE", DEVICE)],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
