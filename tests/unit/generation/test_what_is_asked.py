"""Each setting of a generation reaches what it is about."""

import numpy as np
import pytest
import torch
from diffusers import T2IAdapter

from imprompt.adapters import Handle, create_adapter
from imprompt.checkpoints.identity import Identity
from imprompt.diffusion.guidance import guide_by_instruction, guide_separately
from imprompt.diffusion.late_start import last_timesteps
from imprompt.diffusion.samplers import create_sampler
from imprompt.encoders.face import DioramaFaceEncoder
from imprompt.encoders.face_network import FaceNetwork
from imprompt.generation import (
    Control,
    Explanation,
    IdentityPrompt,
    ImagePrompt,
    InitImage,
    TokenPrompt,
    generate,
    published_guidance,
)
from imprompt.generation.branches import Guidance, stacked_text
from imprompt.generation.conditions import _condition
from imprompt.generation.controls import map_control
from imprompt.generation.identity import read_person
from imprompt.systems.controlnet import create_controlnet
from imprompt.systems.t2i_adapter import create_t2i_adapter

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def draw(base, *prompts, text="red cat", **options):
    images = generate(base, text, prompts, **{"steps": 3, "progress": False, **options})
    return np.stack([np.asarray(i).astype(int) for i in images])


def test_rescaled_guidance_has_the_spread_of_the_conditional():
    unconditional, conditional = torch.randn(2, 1, 4, 8, 8)
    guided = Guidance(scale=7.5, rescaled=1.0).of(
        torch.cat([5 * unconditional, conditional]), ["unconditional", "conditional"]
    )
    torch.testing.assert_close(guided.std(), conditional.std())


def test_rescaling_is_handed_on(base):
    assert (
        draw(base, guidance_scale=30) != draw(base, guidance_scale=30, guidance_rescale=1.0)
    ).any()


def test_without_a_text_scale_the_image_alone_guides():
    nothing, image, full = torch.randn(3, 1, 4, 8, 8)
    torch.testing.assert_close(guide_separately(nothing, image, full, 0.0, 1.0), image)


def test_without_other_scales_the_image_alone_guides_instruct():
    nothing, image, everything, full = torch.randn(4, 1, 4, 8, 8)
    torch.testing.assert_close(
        guide_by_instruction(nothing, image, everything, full, 0.0, 1.0, 0.0), image
    )


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm"])
def test_samplers_do_not_clip_latents(name):
    assert create_sampler(name, CONFIG, 10).config.clip_sample is False


def test_a_share_of_the_steps_is_rounded_as_written():
    assert len(last_timesteps(create_sampler("ddim", CONFIG, 50), 0.58)) == 29


def test_poses_lower_the_published_scale():
    assert published_guidance("the same pose").added_scale == -0.2


@pytest.mark.parametrize("word", ["style", "colour", "everything", "face", "facial hair"])
def test_these_words_are_guided_jointly(word):
    assert published_guidance(f"use the {word}").instruction_scale is None


def test_an_explanation_is_of_the_conditional_half():
    explanation = Explanation()
    explanation.begin(1, 2, 2)
    image = torch.stack([torch.zeros(1, 4, 3), torch.ones(1, 4, 3)])
    explanation._recorder(0, "mid_block.attn", slice(0, 1))(torch.ones(2, 1, 4, 3), image)
    assert explanation.heat_maps(0, size_px=2).min() == 0.5


def test_an_explanation_lies_as_the_picture_does(base, base_adapter, pictures):
    explanation, mask = Explanation(), torch.zeros(32, 64)
    mask[:, :32] = 1
    draw(
        base,
        ImagePrompt(pictures[0], adapter=base_adapter, mask=mask),
        size_px=(32, 64),
        explanation=explanation,
    )
    heat = explanation.heat_maps(0, size_px=16)
    assert heat.shape == (1, 8, 16)
    assert heat[:, :, :6].min() > 0.01 and heat[:, :, 10:].max() < 1e-6


def test_a_lora_acts_in_its_prompts_time(base):
    adapter = create_adapter(base.unet, "faceid", feature_dim=8, lora_rank=2)
    tokens = torch.zeros(1, 4, adapter.cross_attention_dim)
    with adapter.install(base.unet) as handle:
        prompt = TokenPrompt(
            handle=handle, tokens=tokens, zero_tokens=tokens, scale=0.0, start=0.5, end=0.75
        )
    assert [prompt.is_active(step, 4) for step in range(4)] == [False, False, True, False]


def test_each_branch_reads_its_tokens(base, base_adapter, monkeypatch):
    seen, width = [], base_adapter.cross_attention_dim
    parts = {
        n: torch.full((1, 4, width), float(i))
        for i, n in enumerate(("zero_tokens", "image_only_tokens", "uninstructed_tokens", "tokens"))
    }
    with base_adapter.install(base.unet) as handle:
        monkeypatch.setattr(
            Handle, "condition", lambda self, tokens, **_: seen.append(tokens) or {}
        )
        _condition(
            TokenPrompt(handle=handle, **parts),
            ["unconditional", "image_only", "uninstructed", "conditional"],
            slice(0, 1),
            1,
        )
    assert seen[0][:, 0, 0].tolist() == [0, 1, 2, 3]


def test_the_image_alone_reads_the_negative_text(base):
    text, negative = base.encode_text(["red cat"]), base.encode_text([""])
    stacked = stacked_text(
        text, negative, ["unconditional", "image_only", "conditional"], slice(0, 1)
    )
    for row, wanted in enumerate((negative, negative, text)):
        assert torch.equal(stacked.sequence[row], wanted.sequence[0])


@pytest.mark.parametrize("make", [create_controlnet, create_t2i_adapter])
def test_controls_are_drawn_at_the_size_asked_for(base, pictures, make):
    control = Control(image=pictures[0], model=make(base))
    assert draw(base, controls=control, size_px=(48, 64)).shape == (1, 48, 64, 3)


def test_a_start_is_drawn_at_the_size_asked_for(base, pictures):
    init = InitImage(image=pictures[0], strength=0.5)
    assert draw(base, init_image=init, size_px=(24, 64)).shape == (1, 24, 64, 3)


def test_a_guidance_of_zero_is_one(base):
    assert (
        draw(base, text="a", guidance_scale=0) == draw(base, text="cat", guidance_scale=0)
    ).all()


@pytest.fixture(scope="module")
def faces():
    torch.manual_seed(0)
    return DioramaFaceEncoder(FaceNetwork(width=4, embed_dim=8), "tiny")


def test_a_negative_face_is_read(base, faces):
    one, other = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    adapter = create_adapter(base.unet, "faceid", feature_dim=8, lora_rank=2)
    plain, against = (
        draw(base, ImagePrompt(one, adapter=adapter, face_encoder=faces, **n))
        for n in ({}, {"negative": other})
    )
    assert (plain != against).any()


def test_grey_is_of_all_channels(base, pictures):
    config = create_t2i_adapter(base).config
    grey = T2IAdapter(
        in_channels=1,
        **{
            n: config[n] for n in ("channels", "num_res_blocks", "downscale_factor", "adapter_type")
        },
    )
    maps = map_control(Control(image=pictures[0], model=grey), base, None).maps
    levels = torch.from_numpy(np.array(pictures[0])).float().mean(-1) / 255
    torch.testing.assert_close(maps[0, 0], levels, atol=1e-4, rtol=0)


def test_a_persons_weights_and_time_reach_both_ways(base, faces):
    adapter = create_adapter(base.unet, "plus", feature_dim=8, num_tokens=2, depth=1)
    adapter.metadata["reads"] = "id_embeds"
    identity = Identity(adapter, create_controlnet(base))
    person = IdentityPrompt(
        torch.zeros(3, 40, 40),
        identity,
        scale=0.3,
        net_weight=0.5,
        start=0.2,
        end=0.7,
        face_encoder=faces,
    )
    with adapter.install(base.unet) as handle:
        read = read_person(person, base, handle, None, None)
    assert (read.control.weight, read.control.start, read.control.end) == (0.5, 0.2, 0.7)
    assert (read.prompt.scale, read.prompt.start, read.prompt.end) == (0.3, 0.2, 0.7)
