import pytest
import torch
from diffusers import UNet2DConditionModel

from imprompt.adapters import VARIANTS, create_adapter


@pytest.fixture(scope="session")
def tiny_unet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=2,
        ).eval()


def new_adapter(unet, variant):
    # diffusers builds its resamplers with depth 4 and no other.
    return create_adapter(unet, variant, feature_dim=24, id_dim=20, lora_rank=2, depth=4)


@pytest.fixture(params=VARIANTS)
def adapter(request, tiny_unet):
    return new_adapter(tiny_unet, request.param)


@pytest.fixture
def base_adapter(tiny_unet):
    return new_adapter(tiny_unet, "base")


@pytest.fixture
def make_adapter(tiny_unet):
    return lambda variant: new_adapter(tiny_unet, variant)
