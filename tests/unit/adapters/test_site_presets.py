"""Presets of weights: which sites of the real architectures they reach."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

from imprompt.adapters import attention_sites
from imprompt.adapters.site_presets import SITE_PRESETS, execution_order, preset_scales
from imprompt.adapters.sites import scale_per_site
from imprompt.core.errors import ImpromptError

SDXL = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}


def cross_sites(**config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    return [site for site in attention_sites(unet) if site.is_cross]


@pytest.fixture(scope="module")
def sd15():
    return cross_sites(cross_attention_dim=768)


@pytest.fixture(scope="module")
def sdxl():
    return cross_sites(**SDXL)


def test_style_and_composition_of_stable_diffusion_1(sd15):
    # Numbered as the UNet runs them: 6 down, 1 middle, 9 up.
    order = execution_order(sd15)
    style = preset_scales("style", sd15, 0.8)
    assert [place for place, i in enumerate(order) if style[i]] == [0, 1, 2, 3, *range(9, 16)]
    assert set(style) == {0.0, 0.8}
    composition = preset_scales("composition", sd15)
    assert {place: composition[i] for place, i in enumerate(order) if composition[i]} == {
        4: 0.25,
        5: 1.0,
    }
    both = preset_scales("style and composition", sd15)
    assert both == [s + c for s, c in zip(preset_scales("style", sd15), composition, strict=True)]


def test_style_and_composition_of_stable_diffusion_xl(sdxl):
    def reached(name):
        scales = preset_scales(name, sdxl)
        return {s.name.split(".transformer")[0] for s, x in zip(sdxl, scales, strict=True) if x}

    assert len(sdxl) == 70
    assert reached("style") == {"up_blocks.0.attentions.1"}
    assert reached("composition") == {"down_blocks.2.attentions.1"}
    assert reached("style and composition") == reached("style") | reached("composition")


def test_style_of_the_embedded_base():
    sites = cross_sites(
        cross_attention_dim=128,
        block_out_channels=(32, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    )
    style = preset_scales("style", sites, 1.5)
    in_last_block = [site.name.startswith("up_blocks.2.") for site in sites]
    assert style == [pytest.approx(1.5 if last else 0.3) for last in in_last_block]
    with pytest.raises(ImpromptError, match="width 128"):
        preset_scales("style and composition", sites)


def test_curves_follow_the_order_of_execution(sd15):
    order = execution_order(sd15)
    rising = [preset_scales("ease out", sd15)[i] for i in order]
    falling = [preset_scales("ease in", sd15)[i] for i in order]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert rising[0] == pytest.approx(0.05) and falling[0] == pytest.approx(1)
    middle = preset_scales("strong middle", sd15, 2.0)
    assert [s.name for s, x in zip(sd15, middle, strict=True) if x == 2.0] == [sd15[-1].name]
    assert sd15[-1].name.startswith("mid_block")


def test_curves_count_transformers_and_not_the_sites_in_them(sdxl):
    """Stable Diffusion XL has eleven, two or ten sites in each."""
    scales = preset_scales("ease in", sdxl)
    by_transformer = {}
    for site, scale in zip(sdxl, scales, strict=True):
        by_transformer.setdefault(site.name.split(".transformer")[0], set()).add(scale)
    assert len(by_transformer) == 11
    for name, place in (
        ("down_blocks.1.attentions.0", 0),
        ("mid_block.attentions.0", 4),
        ("up_blocks.0.attentions.2", 7),
        ("up_blocks.1.attentions.2", 10),
    ):
        [scale] = by_transformer[name]
        assert scale == pytest.approx(0.05 + 0.95 * (1 - place / 11))


def test_an_unknown_preset_or_an_unknown_unet_is_told(sd15):
    with pytest.raises(ImpromptError, match="choose one of: style"):
        preset_scales("stile", sd15)
    other = cross_sites(cross_attention_dim=512, block_out_channels=(32, 32, 32, 32))
    with pytest.raises(ImpromptError, match="width 512"):
        preset_scales("style", other)
    for name in SITE_PRESETS[3:]:
        assert len(preset_scales(name, other)) == len(other)


@pytest.mark.parametrize(
    "scale",
    [
        {"up": {"block_0": [0.0, 1.0, 0.0]}},
        {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
        {"up": {"block_1": 0.5, "block_0": [0.3]}, "mid": [0.2]},
        {"up": [0.1, 0.2, 0.3], "down": 0.7},
    ],
)
def test_the_nested_form_means_what_it_means_in_diffusers(sdxl, scale):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    [parts] = _maybe_expand_lora_scales(unet, [scale], default_scale=0.0)
    expected = [
        next(float(value) for part, value in parts.items() if site.name.startswith(part))
        for site in sdxl
    ]
    assert scale_per_site(scale, sdxl) == expected


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        ({"up": {"block_0": [0.0, 1.0]}}, "2 numbers, but it has 3"),
        ({"up": {"block_7": 1.0}}, "fits no cross-attention site"),
        ({"up": {"block_0": float("nan")}}, "scale is nan"),
    ],
)
def test_nested_forms_that_do_not_fit(sdxl, scale, reason):
    with pytest.raises(ImpromptError, match=reason):
        scale_per_site(scale, sdxl)


def test_curves_in_and_out(sd15):
    order = execution_order(sd15)
    humped, hollow = (
        [preset_scales(n, sd15)[i] for i in order] for n in ("ease in-out", "reverse in-out")
    )
    assert humped[8] == pytest.approx(1) and humped[0] == pytest.approx(0.05)
    assert hollow[8] == pytest.approx(0.05) and hollow[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "weak"), [("weak input", "down"), ("weak middle", "mid"), ("weak output", "up")]
)
def test_weak_parts_are_those_named(sd15, name, weak):
    for site, scale in zip(sd15, preset_scales(name, sd15), strict=True):
        assert scale == (0.2 if site.name.startswith(weak) else 1.0)
