"""Instruct on Stable Diffusion XL: it reads the first text encoder's last states, as published."""

from dataclasses import replace

import pytest
import torch
from tiny_base import SECOND_TEXT_DIM, TEXT_DIM, TEXT_LENGTH, build_parts, write_tiny_xl_base

from imprompt import ImagePrompt, generate
from imprompt.adapters import create_adapter
from imprompt.bases import ClipImageEncoder, load_base
from imprompt.checkpoints import load_adapter, save_adapter
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns
from imprompt.data.prepare import prepare
from imprompt.encoders.instruction import instruction_states
from imprompt.generation.instructed import published_guidance, words_of
from imprompt.systems import instruct, instruct_words
from imprompt.systems.instruct_growth import with_more_tokens
from imprompt.systems.instruct_options import InstructOptions
from imprompt.systems.instruct_words import InstructWordsOptions

SMALL = InstructOptions(num_tokens=3, resampler_dim=64, depth=1, drop_text=0.0, drop_all=0.0)
WORDS = InstructWordsOptions(num_tokens=3, resampler_dim=64, depth=1)
UNET_WIDTH = TEXT_DIM + SECOND_TEXT_DIM


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = load_base(write_tiny_xl_base(tmp_path_factory.mktemp("bases") / "tiny-xl"))
    base.image_encoder = ClipImageEncoder(build_parts()["image_encoder"])
    return base


@pytest.fixture(scope="module")
def columns(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    prepare("diorama-instruct:20", folder, base, variant="instruct-words")
    return Columns.open(folder)


def test_states_are_what_the_authors_take(base):
    texts = ["use the style", "a red cat"]
    ids = base.tokenizer(
        texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = base.text_encoder(ids)[0]
    assert expected.shape == (2, TEXT_LENGTH, TEXT_DIM)
    text_states = base.encode_text(texts)
    assert torch.equal(base.instruct_states(texts), expected)
    assert torch.equal(base.instruct_states(texts, text_states), expected)
    assert torch.equal(base.instruct_states(base.tokenize(texts)), expected)
    assert torch.equal(base.instruct_states([None]), base.instruct_states([""]))
    assert torch.equal(instruction_states(base, texts), expected)
    ends = (ids == base.tokenizer.eos_token_id).int().argmax(1)
    pooled = instruction_states(base, texts, "pooled")
    assert torch.equal(pooled[:, 0], expected[torch.arange(2), ends])


@pytest.mark.parametrize("embedding", ["tokens", "pooled"])
def test_it_trains_on_the_first_encoders_states(base, columns, embedding):
    system = instruct.build(replace(SMALL, instruction_embedding=embedding), base, columns)
    assert [feature.dim for feature in system.module.projection.features[1:]] == [TEXT_DIM] * 2
    assert system.module.cross_attention_dim == UNET_WIDTH
    batch = columns.rows(range(6), system.columns)
    loss, _ = system.loss(batch, Randomness(0, range(6)))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in system.module.parameters())
    assert all(p.grad is None for part in base.parts().values() for p in part.parameters())


def test_words_are_what_the_denoiser_reads(base, columns):
    system = instruct_words.build(WORDS, base, columns)
    assert system.adapter.projection.features[1].dim == TEXT_DIM
    loss, _ = system.loss(columns.rows(range(4), system.columns), Randomness(0, range(4)))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in system.module.parameters())
    more = with_more_tokens(system.adapter, base, 2)
    assert more.num_tokens == 5


def test_what_it_trained_draws_from_its_file(base, columns, tmp_path):
    system = instruct.build(SMALL, base, columns)
    system.export(tmp_path / "adapter.safetensors")
    system._handle.remove()
    adapter = load_adapter(tmp_path / "adapter.safetensors")
    photo = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def drawn(instruction, negative=None):
        prompt = ImagePrompt(photo, adapter=adapter, instruction=instruction)
        images = generate(
            base,
            ["a red cat", "cat"],
            prompt,
            negative_prompt=negative,
            steps=2,
            guidance_scale=3.0,
            image_guidance_scale=1.0,
            instruction_guidance_scale=6.0,
            progress=False,
        )
        return [image.tobytes() for image in images]

    assert drawn("use the style") == drawn("use the style") != drawn("a dog")
    assert drawn("use the style", "red") != drawn("use the style")


def test_the_whole_texts_state_stays_in_all_passes_but_that_of_nothing(base, monkeypatch):
    adapter = create_adapter(
        base.unet, "instruct", feature_dim=24, text_dim=TEXT_DIM, resampler_dim=64, depth=1
    )
    read = []
    denoise = type(base).denoise
    monkeypatch.setattr(
        type(base), "denoise", lambda self, *given: read.append(given[2]) or denoise(self, *given)
    )
    photo = ImagePrompt(torch.zeros(3, 32, 32), adapter=adapter, instruction="use the duck")
    generate(
        base,
        "a red cat",
        photo,
        negative_prompt="dull",
        steps=1,
        instruction_guidance_scale=5.0,
        progress=False,
    )
    text, negative = base.encode_text(["a red cat"]), base.encode_text(["dull"])
    nothing, image, uninstructed, full = (read[0][[row]] for row in range(4))
    for states in (nothing, image, uninstructed):
        assert torch.allclose(states.sequence, negative.sequence, atol=1e-5)
    for states in (image, uninstructed, full):
        assert torch.allclose(states.pooled, text.pooled, atol=1e-5)
    assert torch.allclose(full.sequence, text.sequence, atol=1e-5)
    assert torch.allclose(nothing.pooled, negative.pooled, atol=1e-5)
    assert not torch.allclose(text.pooled, negative.pooled)


def test_the_authors_strengths_are_lower_than_of_stable_diffusion_1_5(base):
    apart = published_guidance("take the composition", base)
    assert (apart.text_scale, apart.image_scale, apart.instruction_scale) == (5.0, 1.0, 5.0)
    assert apart.added_scale == 0.0


def test_tokens_of_nothing_read_the_empty_text_whatever_the_negative_one(base):
    texts = ["a red cat", "cat"]
    words = words_of(base, texts, base.encode_text(texts), ["red", "cat"])
    assert words.negative_texts is None
    assert torch.equal(words.text_states, base.instruct_states(texts))


def test_an_adapter_of_other_states_is_refused_to_go_on_from(base, tmp_path):
    wide = create_adapter(base.unet, "instruct", feature_dim=24, resampler_dim=64, depth=1)
    assert wide.projection.features[1].dim == UNET_WIDTH
    save_adapter(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ImpromptError, match="states of 40 numbers, and the first .* gives 16"):
        instruct.instruct_adapter(
            replace(SMALL, start_from=str(tmp_path / "wide.safetensors")), base
        )
