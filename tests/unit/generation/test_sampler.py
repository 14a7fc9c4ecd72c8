"""The loop from below: ready tensors, big batches, one condition for each image."""

import pytest
import torch
from tiny_base import TEXT_DIM, VISION_EMBED_DIM

from imprompt.adapters import ImagePromptAdapter
from imprompt.bases import Base
from imprompt.core.errors import ImpromptError
from imprompt.generation import TokenPrompt, initial_noise, sample_latents
from imprompt.generation.conditions import is_zero


def test_noise_of_an_image_does_not_depend_on_the_others() -> None:
    shape = (4, 8, 8)
    many = initial_noise(0, range(6), shape)
    assert torch.equal(initial_noise(0, [4], shape)[0], many[4])
    assert torch.equal(initial_noise(0, [5, 0], shape), many[[5, 0]])
    assert not torch.equal(initial_noise(1, [4], shape)[0], many[4])
    assert many.dtype == torch.float32
    assert abs(many.mean()) < 0.1 and abs(many.std() - 1) < 0.1


def test_each_image_follows_its_own_tokens_in_any_batch(
    base: Base, base_adapter: ImagePromptAdapter
) -> None:
    num_images = 5
    generator = torch.Generator().manual_seed(0)
    tokens = base_adapter.tokens(torch.randn(num_images, VISION_EMBED_DIM, generator=generator))
    zero_tokens = base_adapter.tokens(torch.zeros(1, VISION_EMBED_DIM))
    masks = (torch.rand(num_images, 8, 8, generator=generator) > 0.5).float()
    scales = torch.linspace(0.5, 1, num_images)
    texts = base.encode_text(["red"] * num_images)
    negative = base.encode_text([""])

    with base_adapter.install(base.unet) as handle:

        def sample(rows: list[int], batch_size: int) -> torch.Tensor:
            prompt = TokenPrompt(
                handle=handle,
                tokens=tokens[rows],
                zero_tokens=zero_tokens,
                mask=masks[rows],
                scale=scales[rows],
            )
            return sample_latents(
                base,
                texts[rows],
                negative,
                [prompt],
                steps=3,
                indices=rows,
                batch_size=batch_size,
            )

        everything = sample([0, 1, 2, 3, 4], batch_size=5)
        torch.testing.assert_close(sample([0, 1, 2, 3, 4], 2), everything, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(sample([3], 8)[0], everything[3], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(sample([4, 1], 1), everything[[4, 1]], rtol=1e-3, atol=1e-4)


def test_latents_may_be_used_in_training_afterwards(base: Base) -> None:
    latents = sample_latents(base, base.encode_text(["red"]), steps=2, guidance_scale=1)
    assert not latents.is_inference()
    weight = torch.ones(1, requires_grad=True)
    (latents * weight).sum().backward()


def test_the_loop_keeps_no_gradients_and_no_graph(base: Base) -> None:
    states = base.encode_text(["red"])
    states.sequence.requires_grad_()
    assert not sample_latents(base, states, steps=2, guidance_scale=1).requires_grad


def test_rescaled_guidance_is_less_extreme(base: Base) -> None:
    states, negative = base.encode_text(["red cat"]), base.encode_text([""])
    spread = [
        sample_latents(
            base, states, negative, steps=4, guidance_scale=30, guidance_rescale=amount
        ).std()
        for amount in (0.0, 1.0)
    ]
    assert spread[1] < spread[0]


@pytest.mark.parametrize(
    ("scale", "zero"),
    [
        (0, True),
        (0.0, True),
        (0.1, False),
        ([0.0, 0.0], True),
        ([0.0, 0.1], False),
        ({"mid": 0.0}, False),
        (torch.zeros(3), True),
        (torch.tensor([0.0, 0.2]), False),
    ],
)
def test_which_scales_do_nothing(scale: object, zero: bool) -> None:
    assert is_zero(scale) == zero  # type: ignore[arg-type]


def test_mistakes_are_named(base: Base, base_adapter: ImagePromptAdapter) -> None:
    states, negative = base.encode_text(["red", "cat"]), base.encode_text([""])
    with pytest.raises(ImpromptError, match="needs negative_text_states"):
        sample_latents(base, states)
    with pytest.raises(ImpromptError, match="3 negative_text_states were given for 2"):
        sample_latents(base, states, negative.expand(3))
    with pytest.raises(ImpromptError, match="1 indices were given for 2 images"):
        sample_latents(base, states, negative, indices=[0])
    with base_adapter.install(base.unet) as handle:
        tokens = torch.zeros(3, 4, TEXT_DIM)
        prompt = TokenPrompt(handle=handle, tokens=tokens, zero_tokens=tokens[:1])
        with pytest.raises(ImpromptError, match="tokens for 3 images, but 2 are generated"):
            sample_latents(base, states, negative, [prompt], steps=2)
        prompt = TokenPrompt(handle=handle, tokens=tokens[:2], zero_tokens=tokens)
        with pytest.raises(ImpromptError, match="zero_tokens for 3 images, but 2 are generated"):
            sample_latents(base, states, negative, [prompt], steps=2)
