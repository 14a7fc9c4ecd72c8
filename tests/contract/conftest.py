"""A small UNet of the same classes as Stable Diffusion's, and an adapter of every variant."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from imprompt.adapters import VARIANTS, create_adapter

TEXT_DIM = 64
FEATURE_DIM = 24


def small_unet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_DIM,
            attention_head_dim=(2, 4),
        )
    return unet.eval().requires_grad_(False)


def small_adapter(unet, variant, seed=0):
    adapter = create_adapter(
        unet, variant, feature_dim=FEATURE_DIM, id_dim=20, depth=2, lora_rank=4, seed=seed
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in adapter.named_parameters():
            if ".up." in name:  # zero in a new adapter
                parameter.normal_(std=0.1)
    return adapter


def features_of(adapter, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            (batch, 5, feature.dim) if feature.is_sequence else (batch, feature.dim),
            generator=generator,
        )
        for feature in adapter.projection.features
    ]


@pytest.fixture
def unet():
    return small_unet()


@pytest.fixture(params=VARIANTS)
def adapter(request, unet):
    return small_adapter(unet, request.param)


@pytest.fixture
def base_adapter(unet):
    return small_adapter(unet, "base")


@pytest.fixture
def make_adapter(unet):
    return lambda variant, seed=0: small_adapter(unet, variant, seed)


@pytest.fixture
def make_features():
    return features_of


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([10, 700]),
        torch.randn(2, 7, TEXT_DIM, generator=generator),
    )


@pytest.fixture
def denoise(unet, inputs):
    def call(condition=None, batch=None):
        given = inputs if batch is None else [x[batch] for x in inputs]
        return unet(*given, cross_attention_kwargs=condition).sample

    return call
