"""The architectures people have, at full size: on the meta device, where nothing is computed."""

from typing import Any

import pytest
import torch
from full_size_base import END_OF_TEXT, XL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from imprompt import ImagePromptAdapter, create_adapter
from imprompt.bases import ClipImageEncoder
from imprompt.bases.stable_diffusion import StableDiffusionBase
from imprompt.bases.stable_diffusion_xl import StableDiffusionXLBase

UNETS: dict[str, dict[str, Any]] = {
    "1.5": {"cross_attention_dim": 768, "sample_size": 64},
    "2.1": {
        "cross_attention_dim": 1024,
        "sample_size": 96,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "XL": XL,
}
TEXT_ENCODERS: dict[str, dict[str, int | str]] = {
    "CLIP-L": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "OpenCLIP-H": {
        "hidden_size": 1024,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "OpenCLIP-bigG": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
}
IMAGE_ENCODERS: dict[str, dict[str, int | str]] = {
    "ViT-H": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
    "ViT-bigG": {
        "hidden_size": 1664,
        "intermediate_size": 8192,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
}


@pytest.fixture(scope="module")
def bases() -> dict[str, StableDiffusionBase | StableDiffusionXLBase]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    def text_encoder(name: str, kind: Any = CLIPTextModel) -> Any:
        sizes = TEXT_ENCODERS[name]
        return kind(CLIPTextConfig(**sizes, intermediate_size=4 * int(sizes["hidden_size"])))

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        unets = {name: UNet2DConditionModel(**config) for name, config in UNETS.items()}
        shared: dict[str, Any] = {"vae": vae, "tokenizer": None, "scheduler": None}
        bases: dict[str, StableDiffusionBase | StableDiffusionXLBase] = {
            name: StableDiffusionBase(
                name=name, unet=unets[name], text_encoder=text_encoder(encoder), **shared
            )
            for name, encoder in (("1.5", "CLIP-L"), ("2.1", "OpenCLIP-H"))
        }
        bases["XL"] = StableDiffusionXLBase(
            name="XL",
            unet=unets["XL"],
            text_encoder=text_encoder("CLIP-L"),
            text_encoder_2=text_encoder("OpenCLIP-bigG", CLIPTextModelWithProjection),
            tokenizer_2=END_OF_TEXT,
            **shared,
        )
    return bases


@pytest.mark.parametrize(
    ("name", "num_parameters", "image_size_px", "text_length"),
    [
        ("1.5", 859_520_964, 512, 77),
        ("2.1", 865_910_724, 768, 77),
        ("XL", 2_567_463_684, 1024, 154),
    ],
)
def test_denoising_with_image_prompts(
    bases: dict[str, Any], name: str, num_parameters: int, image_size_px: int, text_length: int
) -> None:
    base = bases[name]
    assert sum(p.numel() for p in base.unet.parameters()) == num_parameters
    assert base.image_size_px == image_size_px
    assert base.latent_shape() == (4, image_size_px // 8, image_size_px // 8)
    states = base.encode_text(torch.zeros(2, text_length, dtype=torch.long, device="meta"))
    width = UNETS[name]["cross_attention_dim"]
    assert states.sequence.shape == (2, 77, width)
    assert (states.pooled is None) == (name != "XL")
    adapter = create_adapter(base.unet, "plus", feature_dim=1280)
    with adapter.install(base.unet) as handle:
        tokens = adapter.tokens(torch.zeros(2, 257, 1280, device="meta"))
        assert tokens.shape == (2, 16, width)
        latents = torch.zeros(2, *base.latent_shape(), device="meta")
        assert base.denoise(latents, 500, states, handle.condition(tokens)).shape == latents.shape


def num_parameters(adapter: ImagePromptAdapter) -> int:
    return sum(parameter.numel() for parameter in adapter.parameters())


@pytest.mark.parametrize(
    ("name", "variant", "feature_dim", "num_sites", "expected"),
    [
        ("1.5", "base", 1024, 16, 22_319_616),
        ("1.5", "plus", 1280, 16, 49_087_488),
        ("1.5", "full", 1280, 16, 21_794_304),
        ("2.1", "base", 1024, 16, 29_759_488),
        ("XL", "base", 1280, 70, 351_285_248),
        ("XL", "base", 1024, 70, 349_188_096),
        ("XL", "plus", 1280, 70, 423_748_864),
    ],
)
def test_adapters_have_the_published_size(
    bases: dict[str, Any], name: str, variant: str, feature_dim: int, num_sites: int, expected: int
) -> None:
    """Twice these numbers are the bytes of the half-precision files that people have."""
    adapter = create_adapter(bases[name].unet, variant, feature_dim=feature_dim)
    assert len(adapter.site_weights) == num_sites
    assert num_parameters(adapter) == expected


@pytest.mark.parametrize(
    ("name", "embed_dim", "hidden_dim"), [("ViT-H", 1024, 1280), ("ViT-bigG", 1280, 1664)]
)
def test_image_encoders(name: str, embed_dim: int, hidden_dim: int) -> None:
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**IMAGE_ENCODERS[name]))
    encoder = ClipImageEncoder(model)
    pixels = torch.zeros(2, 3, 300, 400, device="meta")
    assert encoder.embeds(pixels).shape == (2, embed_dim)
    assert encoder.hidden_states(pixels).shape == (2, 257, hidden_dim)
    assert encoder.zero_hidden_states().shape == (1, 257, hidden_dim)
    assert (encoder.embed_dim, encoder.hidden_dim) == (embed_dim, hidden_dim)
