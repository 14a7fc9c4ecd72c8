"""An adapter more precise than its base: what it brings is cast once, not at every site and step."""

import copy

import pytest
import torch
from tiny_base import TEXT_DIM, build_parts
from torch.utils._python_dispatch import TorchDispatchMode

from imprompt.adapters import create_adapter
from imprompt.adapters.attention import CONDITION_KEY
from imprompt.adapters.casting import cast_conditions
from imprompt.bases import TextStates
from imprompt.bases.stable_diffusion import StableDiffusionBase
from imprompt.generation.conditions import TokenPrompt
from imprompt.generation.sampler import sample_latents

HALF = torch.bfloat16


class Casts(TorchDispatchMode):
    """Counts the tensors that change their precision, while there is a UNet at work."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and self.counts:
            self.counts[-1] += output.dtype != args[0].dtype
        return output

    def count_in(self, unet, call):
        """How many there are in each call of the UNet within `call()`, and what that returns."""
        self.counts, counts = [], []
        hooks = [
            unet.register_forward_pre_hook(lambda *_: self.counts.append(0)),
            unet.register_forward_hook(lambda *_: counts.append(self.counts.pop())),
        ]
        try:
            with self:
                result = call()
        finally:
            for hook in hooks:
                hook.remove()
        return counts, result


@pytest.fixture
def base():
    parts = {name: part for name, part in build_parts().items() if name != "image_encoder"}
    for part in ("unet", "vae", "text_encoder"):
        parts[part] = parts[part].to(HALF)
    return StableDiffusionBase(name="tiny", tokenizer=None, **parts)


def precise_adapter(unet, variant):
    adapter = create_adapter(unet, variant, feature_dim=6, lora_rank=2, depth=1).float()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter.named_parameters():
        if ".up." in name:  # zero in a new adapter
            parameter.data.normal_(std=0.3, generator=generator)
    return adapter


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", ["base", "faceid"])
@pytest.mark.parametrize("over_time", [(1.0,), (1.0, 0.4)])
def test_nothing_of_an_adapter_is_cast_in_a_step(base, variant, over_time):
    text = TextStates(random(2, 7, TEXT_DIM, seed=1).to(HALF))
    tokens = random(2, 3, TEXT_DIM, seed=2)
    # Values that half precision holds, so that all ways of averaging agree.
    mask = torch.zeros(1, 32, 32)
    mask[..., :16] = 1

    def drawn(adapter):
        if adapter is None:
            return sample_latents(base, text[:1], text[1:], steps=3)
        with adapter.install(base.unet) as handle:
            prompts = [
                TokenPrompt(
                    handle=handle,
                    tokens=tokens[:1],
                    zero_tokens=tokens[1:],
                    over_time=over_time,
                    mask=mask,
                    start=start,
                )
                for start in (0.0, 0.5)  # of one LoRA in two prompts no two may be made
            ]
            return sample_latents(base, text[:1], text[1:], prompts, steps=3)

    adapter = precise_adapter(base.unet, variant)
    bare, _ = Casts().count_in(base.unet, lambda: drawn(None))
    counts, latents = Casts().count_in(base.unet, lambda: drawn(adapter))
    assert counts == bare and len(counts) == 3
    assert adapter.site_weights.popitem()[1].to_k_ip.weight.dtype == torch.float32
    if over_time == (1.0,):
        # K' and V' are then rounded once more, for they come of rounded weights.
        beforehand = drawn(copy.deepcopy(adapter).to(HALF))
        assert (latents - beforehand).abs().float().mean() < 0.05 * latents.abs().float().mean()


def test_a_lora_cast_beforehand_draws_the_same(base):
    """Of silent prompts only the LoRA is left, which is rounded in the same way."""
    text = random(2, 7, TEXT_DIM, seed=1).to(HALF)
    latents, tokens = random(2, 4, 8, 8, seed=3).to(HALF), random(1, 3, TEXT_DIM, seed=2)
    adapter = precise_adapter(base.unet, "faceid")
    outputs = []
    for one in (adapter, copy.deepcopy(adapter).to(HALF)):
        with one.install(base.unet) as handle, handle.prompt(tokens, scale=0.0), torch.no_grad():
            outputs.append(base.unet(latents, 5, text).sample)
    assert torch.equal(*outputs)


def test_a_block_casts_once_for_each_layout(base):
    """Also where blocks of one adapter stand within each other: its LoRA acts once."""
    text = random(2, 7, TEXT_DIM, seed=1).to(HALF)
    latents, tokens = random(2, 4, 8, 8, seed=3).to(HALF), random(1, 3, TEXT_DIM, seed=2)

    def twice():
        with torch.no_grad():
            return [base.unet(latents, timestep, text).sample for timestep in (5, 4)]

    bare, silent = Casts().count_in(base.unet, twice)
    adapter = precise_adapter(base.unet, "faceid")
    with adapter.install(base.unet) as handle, handle.prompt(tokens):
        counts, once = Casts().count_in(base.unet, twice)
        with handle.prompt(tokens, scale=0.0):
            _, within = Casts().count_in(base.unet, twice)
        own = handle.condition(tokens, 0.0)
        with torch.no_grad():
            beside = base.unet(latents, 5, text, cross_attention_kwargs=own).sample
    assert counts[1] == bare[1] and not torch.equal(once[0], silent[0])
    assert torch.equal(within[0], once[0]) and torch.equal(beside, once[0])


def test_what_is_precise_enough_stays_the_very_tensor():
    unet = build_parts()["unet"]
    with precise_adapter(unet, "faceid").install(unet) as handle:
        condition = handle.condition(random(1, 3, TEXT_DIM, seed=2), mask=torch.ones(4, 4))
    [same] = cast_conditions([condition], torch.zeros(1))
    for index, site in condition[CONDITION_KEY].items():
        cast = same[CONDITION_KEY][index]
        assert all(a is b for a, b in zip(cast.loras[0].query, site.loras[0].query, strict=True))
        for ours, theirs in zip(cast.prompts, site.prompts, strict=True):
            assert ours.key is theirs.key and ours.mask is theirs.mask
