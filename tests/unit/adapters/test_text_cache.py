"""What is computed once for all steps: the text's K and V, and masks at the sites."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from tiny_base import TEXT_DIM, build_parts

from imprompt.adapters import VARIANTS, attention_sites, combine, create_adapter
from imprompt.adapters.attention import CONDITION_KEY
from imprompt.core.errors import ImpromptError


@pytest.fixture
def unet():
    return build_parts()["unet"]


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor(500),
        torch.randn(2, 7, TEXT_DIM, generator=generator),
    ]


def installed(unet, variant="base", seed=0):
    """A handle, and tokens that are no features of anything."""
    adapter = create_adapter(unet, variant, feature_dim=6, lora_rank=2, depth=1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        if ".up." in name:  # zero in a new adapter
            parameter.data.normal_(std=0.3, generator=generator)
    return adapter.install(unet), torch.randn(2, 3, TEXT_DIM, generator=generator)


def call(unet, inputs, condition):
    with torch.no_grad():
        return unet(*inputs, cross_attention_kwargs=condition).sample


@pytest.fixture
def counted(unet):
    """How often each cross-attention site computed K of the text."""
    counts = Counter()
    for site in attention_sites(unet):
        if site.is_cross:
            site.module.to_k.register_forward_hook(
                lambda *_, index=site.index: counts.update([index])
            )
    return counts


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_output_and_nothing_computed_twice(unet, inputs, counted, variant):
    handle, tokens = installed(unet, variant)
    expected = call(unet, inputs, handle.condition(tokens, 0.7))
    condition = handle.condition(tokens, 0.7, text_states=inputs[2])
    counted.clear()
    assert torch.equal(call(unet, inputs, condition), expected)
    assert torch.equal(call(unet, inputs, condition), expected)
    assert not counted


def test_in_inference_mode(unet, inputs, counted):
    handle, tokens = installed(unet)
    with torch.inference_mode():
        inputs[2] = inputs[2] * 1
        expected = unet(*inputs, cross_attention_kwargs=handle.condition(tokens)).sample
        condition = handle.condition(tokens, text_states=inputs[2])
        counted.clear()
        assert torch.equal(unet(*inputs, cross_attention_kwargs=condition).sample, expected)
    assert not counted


def test_another_text_is_computed_anew(unet, inputs):
    handle, tokens = installed(unet)
    condition = handle.condition(tokens, text_states=inputs[2])
    for other in (inputs[2].clone(), inputs[2].flip(0), inputs[2][:, :3]):
        changed = [*inputs[:2], other]
        expected = call(unet, changed, handle.condition(tokens))
        assert torch.equal(call(unet, changed, condition), expected)


def test_a_write_into_the_text_is_noticed(unet, inputs):
    handle, tokens = installed(unet)
    condition = handle.condition(tokens, text_states=inputs[2])
    before = call(unet, inputs, condition)
    inputs[2][1] = 0.5
    after = call(unet, inputs, condition)
    assert torch.equal(after, call(unet, inputs, handle.condition(tokens)))
    assert not torch.allclose(after, before, atol=1e-4)


def test_weight_zero_computes_what_the_bare_model_does(unet, inputs, counted):
    handle, tokens = installed(unet)
    bare = call(unet, inputs, None)
    condition = handle.condition(tokens, 0.0, text_states=inputs[2])
    assert condition == {CONDITION_KEY: {}}
    assert torch.equal(call(unet, inputs, condition), bare)
    counted.clear()
    some = handle.condition(tokens, {"down": 0.0}, text_states=inputs[2])
    assert not counted.keys() & {s.index for s in attention_sites(unet) if "down" in s.name}
    assert torch.equal(
        call(unet, inputs, some), call(unet, inputs, handle.condition(tokens, {"down": 0.0}))
    )


def test_several_adapters_and_moments_share_the_work(unet, inputs, counted):
    (face, face_tokens), (base, tokens) = installed(unet, "faceid"), installed(unet, seed=1)
    first, second = face.condition(face_tokens, 0.5), base.condition(tokens)
    steps = [combine(first, second), combine(second), combine(second, second)]
    expected = [call(unet, inputs, condition) for condition in steps]
    counted.clear()
    prepared = base.prepare(steps, inputs[2])
    # Once with the face's LoRA, and once without for the other two.
    assert set(counted.values()) == {2}
    for condition, output in zip(prepared, expected, strict=True):
        assert torch.equal(call(unet, inputs, condition), output)
    assert set(counted.values()) == {2}


def test_combining_forgets_the_text(unet, inputs):
    # A LoRA that joins would be missing from the K and V of the others.
    (face, face_tokens), (base, tokens) = installed(unet, "faceid"), installed(unet, seed=1)
    prepared = base.condition(tokens, text_states=inputs[2])
    together = combine(prepared, face.condition(face_tokens, lora_scale=0.5))
    expected = combine(base.condition(tokens), face.condition(face_tokens, lora_scale=0.5))
    assert torch.equal(call(unet, inputs, together), call(unet, inputs, expected))


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_peft_lora_is_never_missing(unet, inputs, loaded):
    from peft import LoraConfig

    def load():
        torch.manual_seed(3)
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))

    handle, tokens = installed(unet)
    if loaded == "before":
        load()
    condition = handle.condition(tokens, text_states=inputs[2])
    plain = handle.condition(tokens)
    if loaded == "after":
        load()
    outputs = [call(unet, inputs, condition | {"scale": scale}) for scale in (1.0, 0.2)]
    for scale, output in zip((1.0, 0.2), outputs, strict=True):
        assert torch.equal(output, call(unet, inputs, plain | {"scale": scale}))
    assert not torch.allclose(*outputs, atol=1e-4)


def test_beside_a_processor_that_is_not_plain(unet, inputs, counted):
    class Own(AttnProcessor):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    unet.set_attn_processor(Own())
    handle, tokens = installed(unet)
    expected = call(unet, inputs, handle.condition(tokens))
    condition = handle.condition(tokens, text_states=inputs[2])
    counted.clear()
    assert torch.equal(call(unet, inputs, condition), expected)
    assert counted  # it computes its own, whatever it does with them


def test_gradient_reaches_the_text(unet, inputs):
    handle, tokens = installed(unet)
    text = inputs[2].requires_grad_()
    gradients = []
    for states in (None, text):
        condition = handle.condition(tokens.detach(), text_states=states)
        unet(*inputs, cross_attention_kwargs=condition).sample.square().sum().backward()
        gradients.append(text.grad)
        text.grad = None
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (16, 16)])
@pytest.mark.parametrize("num_masks", [1, 2])
def test_masks_at_the_sites(unet, inputs, monkeypatch, size, num_masks):
    handle, tokens = installed(unet)
    mask = torch.rand(num_masks, *size, generator=torch.Generator().manual_seed(4))
    conditions = [handle.condition(tokens, scale, mask) for scale in (1.0, 0.4)]
    expected = [call(unet, inputs, condition) for condition in conditions]
    prepared = handle.prepare(conditions, inputs[2], latent_size=(8, 8))

    def never(*_):
        raise AssertionError("computed in a step")

    monkeypatch.setattr("imprompt.adapters.attention.mask_at_site", never)
    for condition, output in zip(prepared, expected, strict=True):
        assert torch.equal(call(unet, inputs, condition), output)


def test_a_mask_of_another_resolution_than_prepared(unet, inputs):
    handle, tokens = installed(unet)
    mask = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(4))
    condition = handle.condition(tokens, mask=mask)
    [prepared] = handle.prepare([condition], latent_size=(20, 20))
    assert torch.equal(call(unet, inputs, prepared), call(unet, inputs, condition))
    with pytest.raises(ImpromptError, match="aspect ratio"):
        handle.prepare([condition], latent_size=(8, 24))


@pytest.mark.parametrize(("size", "fits"), [((54, 50), True), ((60, 50), False)])
def test_where_the_picture_is_known_its_shape_is_asked_for(unet, inputs, size, fits):
    """A site by itself knows how many positions it has, and takes the nearest grid for the mask's."""
    handle, tokens = installed(unet)
    condition = handle.condition(tokens, mask=torch.rand(1, *size))
    alone = call(unet, inputs, condition)
    if not fits:
        with pytest.raises(ImpromptError, match="aspect ratio"):
            handle.prepare([condition], latent_size=(8, 8))
        return
    [prepared] = handle.prepare([condition], latent_size=(8, 8))
    assert torch.equal(call(unet, inputs, prepared), alone)


@pytest.mark.parametrize("size", [(112, 144), (96, 168), (80, 192), (104, 152)])
def test_a_square_mask_fits_none_of_xl_s_other_shapes(unet, size):
    """Of their numbers of positions some grid is nearly square, which is not the picture's."""
    handle, tokens = installed(unet)
    condition = handle.condition(tokens, mask=torch.ones(1, 64, 64))
    with pytest.raises(ImpromptError, match="aspect ratio"):
        handle.prepare([condition], latent_size=size)


def test_a_pipeline_s_calls_have_the_mask_at_the_picture_s_own_grid(unet):
    """14 x 18 positions are also 12 x 21, to which the nearest of a mask's shapes may point."""
    handle, tokens = installed(unet)
    tokens = tokens[:1]
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(1, 4, 14, 18, generator=generator)
    text = torch.randn(1, 7, tokens.shape[-1], generator=generator)
    mask = torch.zeros(1, 13, 18)
    mask[:, :, :9] = 1
    with torch.no_grad():
        with handle.prompt(tokens, mask=mask, guidance=False):
            drawn = unet(sample, 5, text).sample
        condition = handle.condition(tokens, mask=mask)
        [prepared] = handle.prepare([condition], latent_size=(14, 18))
        expected = unet(sample, 5, text, cross_attention_kwargs=prepared).sample
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("over_time", [(1.0,), (1.0, 0.2)])
def test_a_generation_computes_it_once(unet, counted, over_time):
    from imprompt.bases import TextStates
    from imprompt.bases.stable_diffusion import StableDiffusionBase
    from imprompt.generation.conditions import TokenPrompt
    from imprompt.generation.sampler import sample_latents

    parts = {name: part for name, part in build_parts().items() if name != "image_encoder"}
    base = StableDiffusionBase(name="tiny", tokenizer=None, **{**parts, "unet": unet})
    handle, tokens = installed(unet)
    prompt = TokenPrompt(
        handle=handle,
        tokens=tokens[:1],
        zero_tokens=tokens[1:],
        mask=torch.ones(1, 32, 32),
        over_time=over_time,
        end=0.5,
    )
    text = TextStates(torch.randn(2, 7, TEXT_DIM, generator=torch.Generator().manual_seed(5)))
    sample_latents(base, text[:1], text[1:], [prompt], steps=8)
    # Once for the four steps that have a prompt, and at each of the four bare ones.
    assert set(counted.values()) == {1 + 4}


def test_mistakes(unet, inputs):
    handle, tokens = installed(unet)
    with pytest.raises(ImpromptError, match=r"handle\.condition"):
        handle.prepare([{}], inputs[2])
    condition = handle.condition(tokens)
    handle.remove()
    with pytest.raises(ImpromptError, match="removed"):
        handle.prepare([condition], inputs[2])


COMPILED = """
import torch
from tiny_base import TEXT_DIM, build_parts
from imprompt.adapters import create_adapter
unet = build_parts()["unet"]
adapter = create_adapter(unet, "base", feature_dim=6)
handle = adapter.install(unet)
latents, text, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 7, TEXT_DIM), torch.randn(1, 3, TEXT_DIM)
mask = torch.zeros(1, 8, 8)
mask[..., :4] = 1
compiled = torch.compile(unet, backend="eager", fullgraph=True)

def check(text, condition, plain):
    for timestep in (900, 500, 100):
        inputs = latents, torch.tensor(timestep), text
        expected = unet(*inputs, cross_attention_kwargs=plain).sample
        actual = compiled(*inputs, cross_attention_kwargs=condition).sample
        assert torch.allclose(actual, expected, atol=1e-6)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]

for context in (torch.no_grad(), torch.inference_mode()):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with context:
        text = torch.randn(2, 7, TEXT_DIM)
        for scale in (1.0, 0.6, 0.3):
            plain = handle.condition(tokens, scale, mask)
            [prepared] = handle.prepare([plain], text, (8, 8))
            num_graphs = check(text, prepared, plain)
        assert num_graphs == 1, num_graphs
        other = torch.randn(2, 7, TEXT_DIM)  # not what was prepared: a graph that computes it
        assert check(other, prepared, plain) == 2
        report = torch._dynamo.explain(unet)(latents, 5, text, cross_attention_kwargs=prepared)
        assert report.graph_break_count == 0, report
"""


def test_compiles_into_one_graph(request):
    # In a process of its own, where no runtime type checks stand between the compiler and the code.
    root = request.config.rootpath
    result = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={
            "PYTHONPATH": f"{root / 'src'}:{root / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "HOME": "/tmp",
        },
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
