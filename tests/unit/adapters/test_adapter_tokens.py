"""Tokens of every variant, and mistakes on the way to them."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from imprompt.adapters import VARIANTS, create_adapter
from imprompt.adapters.sites import attention_sites, scale_per_site
from imprompt.core.errors import ImpromptError


@pytest.fixture(scope="module")
def unet():
    return tiny_unet(cross_attention_dim=64)


def tiny_unet(cross_attention_dim, **options):
    return UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": cross_attention_dim,
            "attention_head_dim": 2,
            **options,
        }
    )


def adapter_of(unet, variant):
    return create_adapter(unet, variant, feature_dim=24, id_dim=20, depth=1, lora_rank=2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes(unet, variant):
    adapter = adapter_of(unet, variant)
    features = [
        torch.randn((3, 5, f.dim) if f.is_sequence else (3, f.dim))
        for f in adapter.projection.features
    ]
    tokens = adapter.tokens(*features)
    assert tokens.shape == (3, adapter.num_tokens or 5, adapter.cross_attention_dim)
    assert adapter.variant == variant
    assert adapter.tokens(*(f.half() for f in features)).dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrong_features(unet, variant):
    adapter = adapter_of(unet, variant)
    for features in ([], [torch.randn(2, 7)], [torch.randn(2, 3, 7)], [torch.randn(2, 24)] * 4):
        with pytest.raises(ImpromptError, match=adapter.projection.features[0].name):
            adapter.tokens(*features)


def test_batches_of_features_agree(unet):
    adapter = adapter_of(unet, "faceid-plus")
    with pytest.raises(ImpromptError, match=r"id_embeds \(batch, 20\)"):
        adapter.tokens(torch.randn(2, 20), torch.randn(3, 5, 24))


def test_shortcut(unet):
    adapter = adapter_of(unet, "faceid-plus")
    features = torch.randn(2, 20), torch.randn(2, 5, 24)
    first = adapter.tokens(*features)
    second = adapter.tokens(*features, shortcut=True, shortcut_scale=0.5)
    identity = second - 0.5 * first
    assert torch.allclose(identity.mean(-1), torch.zeros(()), atol=1e-5)  # it left a LayerNorm
    adapter.image_proj.shortcut = True  # the file said so
    assert torch.equal(adapter.tokens(*features, shortcut_scale=0.5), second)
    with pytest.raises(ImpromptError, match="base adapter has no option shortcut"):
        adapter_of(unet, "base").tokens(torch.randn(2, 24), shortcut=True)


def test_unknown_variant(unet):
    with pytest.raises(ImpromptError, match="faceid-plus"):
        create_adapter(unet, "turbo", feature_dim=8)


def test_a_model_without_attention():
    with pytest.raises(ImpromptError, match="UNet2DConditionModel"):
        create_adapter(torch.nn.Linear(2, 2), feature_dim=8)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"cross_attention_dim": 768}, "text width 64.*Stable Diffusion 1.x"),
        ({"cross_attention_dim": 64, "layers_per_block": 2}, "4 cross-.*6 cross-.*without weights"),
        ({"cross_attention_dim": 64, "block_out_channels": (16, 16)}, "First difference, site 1"),
    ],
)
def test_another_unet(unet, other, message):
    wrong = tiny_unet(**other)
    processors = dict(wrong.attn_processors)
    with pytest.raises(ImpromptError, match=message):
        adapter_of(unet, "base").install(wrong)
    assert dict(wrong.attn_processors) == processors


def test_scale_per_site(unet):
    sites = [site for site in attention_sites(unet) if site.is_cross]
    names = [site.name.split(".")[0] for site in sites]
    assert names == ["down_blocks", "up_blocks", "up_blocks", "mid_block"]
    assert scale_per_site(0.5, sites) == [0.5] * 4
    assert scale_per_site((0, 1, 2, 3), sites) == [0, 1, 2, 3]
    assert scale_per_site({"mid": 0, "down": 0.5}, sites) == [0.5, 1, 1, 0]
    assert scale_per_site({"up": 0, "up_blocks.1.attentions.1": 0.5}, sites) == [1, 0, 0.5, 1]
