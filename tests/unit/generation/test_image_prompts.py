"""What an ImagePrompt can say beyond its image: over time, over sites, against, merged."""

import numpy
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from imprompt.core.errors import ImpromptError
from imprompt.generation import Explanation, ImagePrompt, generate
from imprompt.generation.conditions import TokenPrompt
from imprompt.generation.features import check_image_like
from imprompt.generation.pipeline import _listed


def draw(base, *prompts, steps=4, **options):
    options = {"guidance_scale": 3, "progress": False, **options}
    images = generate(base, "red cat", prompts, steps=steps, **options)
    return numpy.stack([numpy.asarray(image).astype(int) for image in images])


def test_the_course_of_lambda(base, base_adapter):
    nothing = torch.zeros(1, 1, base_adapter.cross_attention_dim)
    with base_adapter.install(base.unet) as handle:
        pass

    def factors(steps, **settings):
        prompt = TokenPrompt(handle=handle, tokens=nothing, zero_tokens=nothing, **settings)
        return [round(prompt.factor_at(step, steps), 6) for step in range(steps)]

    assert factors(4) == [1, 1, 1, 1]
    assert factors(5, over_time=(1, 0)) == [1, 0.75, 0.5, 0.25, 0]
    assert factors(5, over_time=(0, 1, 0)) == [0, 0.5, 1, 0.5, 0]
    assert (
        factors(10, start=0.3, end=0.6, over_time=(0.2, 0.6)) == [0] * 3 + [0.2, 0.4, 0.6] + [0] * 4
    )
    assert factors(3, scale=0.0, over_time=(1, 2)) == [0, 0, 0]
    for bad in ((), (1, float("nan"))):
        with pytest.raises(ImpromptError, match="over_time"):
            factors(3, over_time=bad)


def test_a_constant_course_is_a_scale(base, adapter, pictures):
    half = draw(base, ImagePrompt(pictures[0], adapter=adapter, scale=0.5))
    course = draw(base, ImagePrompt(pictures[0], adapter=adapter, over_time=(0.5, 0.5)))
    assert abs(half - course).max() <= 1
    fading = draw(base, ImagePrompt(pictures[0], adapter=adapter, over_time=(1, 0)))
    whole = draw(base, ImagePrompt(pictures[0], adapter=adapter))
    assert len({half.tobytes(), fading.tobytes(), whole.tobytes()}) == 3


def test_equal_images_merged_by_mean_are_one_image(base, base_adapter, pictures):
    one = draw(base, ImagePrompt(pictures[0], adapter=base_adapter))
    twice = ImagePrompt([pictures[0], pictures[0]], adapter=base_adapter, merge="mean")
    assert abs(draw(base, twice) - one).max() <= 1
    other = ImagePrompt([pictures[0], pictures[1]], adapter=base_adapter, merge="mean")
    assert abs(draw(base, other) - one).max() > 1
    weighted = ImagePrompt(pictures[:2], adapter=base_adapter, merge="mean", image_weights=(1, 0))
    assert abs(draw(base, weighted) - one).max() <= 1


def test_each_image_of_a_generation_may_have_its_own(base, adapter, pictures):
    each = draw(base, ImagePrompt(pictures[:2], adapter=adapter, merge="each"), num_images=2)
    for row, picture in enumerate(pictures[:2]):
        alone = draw(base, ImagePrompt(picture, adapter=adapter), num_images=2)
        assert abs(each[row] - alone[row]).max() <= 1
    assert abs(each[0] - alone[0]).max() > 1
    with pytest.raises(ImpromptError, match="tokens for 2"):
        draw(base, ImagePrompt(pictures[:2], adapter=adapter, merge="each"), num_images=3)
    with pytest.raises(ImpromptError, match="neither image_weights nor tiles"):
        ImagePrompt(pictures[:2], adapter=adapter, merge="each", crop="tiles")


def test_a_negative_image_matters_only_under_guidance(base, adapter, pictures):
    plain = ImagePrompt(pictures[0], adapter=adapter)
    against = ImagePrompt(pictures[0], adapter=adapter, negative=pictures[1])
    assert (draw(base, plain) != draw(base, against)).any()
    assert (draw(base, plain, guidance_scale=1) == draw(base, against, guidance_scale=1)).all()


def test_a_preset_is_its_sites_scales(base, base_adapter, pictures):
    weak = ImagePrompt(pictures[0], adapter=base_adapter, site_preset="weak output", scale=0.9)
    named = ImagePrompt(
        pictures[0], adapter=base_adapter, scale={"up": 0.18, "down": 0.9, "mid": 0.9}
    )
    assert abs(draw(base, weak) - draw(base, named)).max() <= 1
    with pytest.raises(ImpromptError, match="one number"):
        ImagePrompt(pictures[0], adapter=base_adapter, site_preset="style", scale={"up": 1.0})


def test_tiles_are_read_one_after_the_other(base, base_adapter, pictures):
    wide = torch.cat([torch.full((3, 8, 8), -0.5), torch.full((3, 8, 8), 0.5)], 2)
    tiles = ImagePrompt(wide, adapter=base_adapter, crop="tiles")
    parts = ImagePrompt([wide[:, :, :8], wide[:, :, 8:]], adapter=base_adapter)
    assert (draw(base, tiles) == draw(base, parts)).all()
    with pytest.raises(ImpromptError, match="tiles"):
        ImagePrompt(wide, adapter=base_adapter, crop="tiles", image_weights=(1,))


def test_an_explanation_shows_where_a_mask_let_the_image_act(base, adapter, pictures, left_half):
    explanation = Explanation()
    prompt = ImagePrompt(pictures[0], adapter=adapter, mask=left_half)
    images = generate(
        base, "cat", prompt, num_images=3, steps=2, batch_size=2, progress=False,
        explanation=explanation,
    )  # fmt: skip
    heat = explanation.heat_maps(0, size_px=8)
    assert heat.shape == (3, 8, 8)
    assert float(heat.min()) >= 0 and float(heat.max()) <= 1
    assert float(heat[:, :, :3].mean()) > 0.05
    assert float(heat[:, :, 5:].abs().max()) < 1e-6
    assert explanation.heat_maps(0, "up_blocks.", 8).shape == (3, 8, 8)
    sheet = explanation.sheet(images)
    assert sheet.width > sheet.height > 3 * 100
    with pytest.raises(ImpromptError, match="Nothing was recorded"):
        explanation.heat_maps(1)


class Foreign(AttnProcessor2_0):
    """A processor that only its class knows."""


def test_an_explanation_is_summed_where_the_attention_is():
    explanation = Explanation()
    explanation.begin(2, 4, 4)
    record = explanation._recorder(0, "mid_block.attn", slice(0, 2))
    for _ in range(2):
        record(*torch.ones(2, 4, 1, 16, 3, device="meta"))  # text and image
    assert explanation._sums[0, "mid_block.attn"].device.type == "meta"
    assert explanation._counts[0, "mid_block.attn"].tolist() == [[2], [2]]


def test_what_cannot_be_explained_says_a_way_that_works(base, adapter, pictures):
    prompt, before = ImagePrompt(pictures[0], adapter=adapter), base.unet.attn_processors
    try:
        base.unet.set_attn_processor(Foreign())
        handle = adapter.install(base.unet)
        with pytest.raises(ImpromptError, match="remove the handles .* then call"):
            draw(base, prompt, explanation=Explanation())
        handle.remove()
        base.unet.set_attn_processor(AttnProcessor2_0())
        draw(base, prompt, explanation=Explanation())
    finally:
        base.unet.set_attn_processor(before)


def test_explaining_changes_nothing_and_needs_prompts_that_act(base, adapter, pictures):
    explanation = Explanation()
    prompt = ImagePrompt(pictures[0], adapter=adapter, start=0.5)
    assert (draw(base, prompt) == draw(base, prompt, explanation=explanation)).all()
    assert explanation.prompts == [0]
    draw(base, ImagePrompt(pictures[0], adapter=adapter, scale=0.0), explanation=explanation)
    with pytest.raises(ImpromptError, match="nothing to explain"):
        explanation.sheet([])


def test_an_explanation_numbers_prompts_as_they_were_given(base, base_adapter, pictures):
    explanation = Explanation()
    silent, acts = (ImagePrompt(pictures[0], adapter=base_adapter, scale=s) for s in (0, 1))
    draw(base, silent, acts, explanation=explanation)
    assert explanation.prompts == [1]


def test_an_array_is_a_picture(base, base_adapter, pictures, left_half):
    expected = draw(base, ImagePrompt(pictures[0], adapter=base_adapter, mask=left_half))
    half = left_half.numpy()
    for mask in (half, numpy.uint8(255 * half), numpy.uint8(half), half.astype(bool)):
        array = ImagePrompt(numpy.asarray(pictures[0]), adapter=base_adapter, mask=mask)
        assert (draw(base, array) == expected).all()
    with pytest.raises(ImpromptError, match="no picture"):
        ImagePrompt(numpy.zeros((8, 8)), adapter=base_adapter)
    with pytest.raises(ImpromptError, match="not as a int"):
        check_image_like(7)


def test_what_is_no_image_prompt_is_told(base_adapter, pictures):
    prompt = ImagePrompt(pictures[0], adapter=base_adapter)
    assert _listed(prompt, ImagePrompt, "image_prompts") == [prompt]
    for prompts in (["photo.png"], "photo.png", [prompt, "photo.png"]):
        with pytest.raises(ImpromptError, match=r"a str is among them.*imprompt\.ImagePrompt"):
            _listed(prompts, ImagePrompt, "image_prompts")


def test_an_explanation_counts_persons_apart_from_image_prompts():
    explanation = Explanation()
    assert explanation._name(1) == "prompt 2"
    explanation.num_image_prompts = 1
    assert [explanation._name(n) for n in range(3)] == ["prompt 1", "person 1", "person 2"]
