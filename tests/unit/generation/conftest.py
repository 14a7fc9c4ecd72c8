"""A tiny base, adapters for it, and pictures."""

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from tiny_base import IMAGE_SIZE_PX, VISION_EMBED_DIM, VISION_HIDDEN_DIM, write_tiny_base

from imprompt.adapters import ImagePromptAdapter, create_adapter
from imprompt.bases import Base, load_base


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="package")
def base(folder: Path) -> Base:
    return load_base(folder)


@pytest.fixture(scope="package", params=["base", "plus", "full"])
def adapter(request: pytest.FixtureRequest, base: Base) -> ImagePromptAdapter:
    return create_adapter(base.unet, request.param, feature_dim=feature_dim(request.param))


@pytest.fixture(scope="package")
def base_adapter(base: Base) -> ImagePromptAdapter:
    return create_adapter(base.unet, "base", feature_dim=VISION_EMBED_DIM, seed=1)


def feature_dim(variant: str) -> int:
    return VISION_EMBED_DIM if variant == "base" else VISION_HIDDEN_DIM


@pytest.fixture(scope="package")
def pictures() -> list[Image.Image]:
    generator = numpy.random.default_rng(0)
    shape = (3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)
    return [Image.fromarray(x) for x in generator.integers(0, 256, shape, dtype=numpy.uint8)]


@pytest.fixture
def left_half() -> torch.Tensor:
    mask = torch.zeros(IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    mask[:, : IMAGE_SIZE_PX // 2] = 1
    return mask
