"""Every published adapter, at its true sizes, is known by its keys and shapes alone.

The sizes are written down here key by key, apart from the classes that are under test. The files
are sparse: a header, and as many zeros as it declares, which take no room on the disk.
"""

import json
import math
import struct
from typing import NamedTuple

import pytest
import torch
from diffusers import UNet2DConditionModel

from imprompt.adapters.sites import attention_sites
from imprompt.checkpoints import inspect, load_adapter
from imprompt.checkpoints.detection import build
from imprompt.checkpoints.files import read_adapter
from imprompt.checkpoints.layouts import to_official
from imprompt.checkpoints.unet_names import known_site_names

# Widths of the cross-attention layers, in order: down, up, mid.
SD15_SITES = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
SDXL_SITES = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10
LORA_RANK = 128


def linear(name, out_dim, in_dim, *, bias=True):
    return {f"{name}.weight": (out_dim, in_dim)} | ({f"{name}.bias": (out_dim,)} if bias else {})


def norm(name, dim):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def layers(name, dim, heads, multiplier=4, depth=4):
    shapes = {}
    for j in range(depth):
        attention, widen = f"{name}.{j}.0", f"{name}.{j}.1"
        shapes |= norm(f"{attention}.norm1", dim) | norm(f"{attention}.norm2", dim)
        shapes |= linear(f"{attention}.to_q", heads * 64, dim, bias=False)
        shapes |= linear(f"{attention}.to_kv", heads * 128, dim, bias=False)
        shapes |= linear(f"{attention}.to_out", dim, heads * 64, bias=False)
        shapes |= norm(f"{widen}.0", dim)
        shapes |= linear(f"{widen}.1", dim * multiplier, dim, bias=False)
        shapes |= linear(f"{widen}.3", dim, dim * multiplier, bias=False)
    return shapes


def base(width, features):
    return linear("proj", 4 * width, features) | norm("norm", width)


def plus(width, features, dim, heads):
    shapes = {"latents": (1, 16, dim)} | linear("proj_in", dim, features)
    shapes |= linear("proj_out", width, dim) | norm("norm_out", width)
    return shapes | layers("layers", dim, heads)


def instruct(width, features, dim, heads):
    """The instruction and the prompt are 768 wide in both: SDXL's first text encoder reads them."""
    shapes = plus(width, features, dim, heads)
    shapes |= linear("proj_prompt_input", dim, 768) | linear("proj_new_input", dim, 768)
    shapes |= layers("prompt_layers", dim, heads, 2) | layers("new_input_layers", dim, heads, 2)
    return shapes


def full(width, features):
    return (
        linear("proj.0", features, features)
        | linear("proj.2", width, features)
        | norm("proj.3", width)
    )


def faceid(width, tokens=4):
    return (
        linear("proj.0", 1024, 512) | linear("proj.2", tokens * width, 1024) | norm("norm", width)
    )


def faceid_plus(width):
    shapes = linear("perceiver_resampler.proj_in", width, 1280)
    shapes |= linear("perceiver_resampler.proj_out", width, width)
    shapes |= norm("perceiver_resampler.norm_out", width)
    return shapes | faceid(width) | layers("perceiver_resampler.layers", width, width // 64)


def sites(widths, text_dim, *, lora=False):
    shapes = {}
    for position, inner in enumerate(widths):
        for index in (2 * position, 2 * position + 1):
            if lora:
                read = text_dim if index % 2 else inner
                for part in ("to_q", "to_k", "to_v", "to_out"):
                    in_dim = read if part in ("to_k", "to_v") else inner
                    shapes[f"{index}.{part}_lora.down.weight"] = (LORA_RANK, in_dim)
                    shapes[f"{index}.{part}_lora.up.weight"] = (inner, LORA_RANK)
            if index % 2:
                shapes[f"{index}.to_k_ip.weight"] = (inner, text_dim)
                shapes[f"{index}.to_v_ip.weight"] = (inner, text_dim)
    return shapes


def sd15(projection, *, lora=False):
    return {"image_proj": projection, "ip_adapter": sites(SD15_SITES, 768, lora=lora)}


def sdxl(projection, *, lora=False):
    return {"image_proj": projection, "ip_adapter": sites(SDXL_SITES, 2048, lora=lora)}


IMAGE, HIDDEN, FACE = "image_embeds", "hidden_states", "id_embeds"
INSTRUCT = (HIDDEN, "instruction_states", "prompt_states")


class Published(NamedTuple):
    """What there is to know of a file, and what it looks like inside."""

    file: str  # without an ending
    variant: str
    tokens: int | None
    heads: int | None
    parameters: int  # halved precision makes these twice as many bytes: 44.6 MB, 98.2 MB, …
    reads: tuple[str, ...]
    projection: dict
    text_dim: int = 768
    lora_rank: int = 0
    known_as: str | None = None  # by default its name

    def shapes(self):
        widths = SD15_SITES if self.text_dim == 768 else SDXL_SITES
        shapes = {f"image_proj.{key}": shape for key, shape in self.projection.items()}
        for key, shape in sites(widths, self.text_dim, lora=self.lora_rank > 0).items():
            shapes[f"ip_adapter.{key}"] = shape
        return shapes


SD15, SDXL = 768, 2048
PLUS15, PLUSXL = plus(SD15, 1280, 768, 12), plus(SDXL, 1280, 1280, 20)
FACES = plus(SDXL, 512, 1280, 20)  # a resampler of face embeddings
BOTH_BASES = "ip-adapter_sd15 or ip-adapter_sd15_light"
PUBLISHED = [
    Published("ip-adapter_sd15", "base", 4, None, 22_319_616, (IMAGE,), base(SD15, 1024)),
    Published("ip-adapter_sd15_light", "base", 4, None, 22_319_616, (IMAGE,), base(SD15, 1024)),
    Published(
        "renamed", "base", 4, None, 22_319_616, (IMAGE,), base(SD15, 1024), known_as=BOTH_BASES
    ),
    Published("ip-adapter_sd15_vit-G", "base", 4, None, 23_106_048, (IMAGE,), base(SD15, 1280)),
    Published("ip-adapter-plus_sd15", "plus", 16, 12, 49_087_488, (HIDDEN,), PLUS15),
    Published("ip-adapter-plus-face_sd15", "plus", 16, 12, 49_087_488, (HIDDEN,), PLUS15),
    Published(
        "ip-adapter-full-face_sd15", "full", None, None, 21_794_304, (HIDDEN,), full(SD15, 1280)
    ),
    Published(
        "ip-adapter-faceid_sd15",
        "faceid",
        4,
        None,
        48_354_816,
        (FACE,),
        faceid(SD15),
        lora_rank=128,
    ),
    Published(
        "ip-adapter-faceid-plus_sd15",
        "faceid-plus",
        4,
        12,
        78_260_736,
        (FACE, HIDDEN),
        faceid_plus(SD15),
        lora_rank=128,
    ),
    Published(
        "ip-adapter-faceid-plusv2_sd15",
        "faceid-plus",
        4,
        12,
        78_260_736,
        (FACE, HIDDEN),
        faceid_plus(SD15),
        lora_rank=128,
    ),
    Published(
        "ip-adapter-faceid-portrait_sd15", "faceid", 16, None, 32_291_328, (FACE,), faceid(SD15, 16)
    ),
    Published(
        "ip-adapter-faceid-portrait-v11_sd15",
        "faceid",
        16,
        None,
        32_291_328,
        (FACE,),
        faceid(SD15, 16),
    ),
    Published("ip-adapter_sdxl", "base", 4, None, 351_285_248, (IMAGE,), base(SDXL, 1280), SDXL),
    Published(
        "ip-adapter_sdxl_vit-h", "base", 4, None, 349_188_096, (IMAGE,), base(SDXL, 1024), SDXL
    ),
    Published("ip-adapter-plus_sdxl_vit-h", "plus", 16, 20, 423_748_864, (HIDDEN,), PLUSXL, SDXL),
    Published(
        "ip-adapter-plus-face_sdxl_vit-h", "plus", 16, 20, 423_748_864, (HIDDEN,), PLUSXL, SDXL
    ),
    Published(
        "ip-adapter-faceid_sdxl", "faceid", 4, None, 535_507_968, (FACE,), faceid(SDXL), SDXL, 128
    ),
    Published(
        "ip-adapter-faceid-plusv2_sdxl",
        "faceid-plus",
        4,
        32,
        743_707_648,
        (FACE, HIDDEN),
        faceid_plus(SDXL),
        SDXL,
        128,
    ),
    Published(
        "ip-adapter-faceid-portrait_sdxl",
        "faceid",
        16,
        None,
        374_903_808,
        (FACE,),
        faceid(SDXL, 16),
        SDXL,
    ),
    Published(
        "ip-adapter-faceid-portrait_sdxl_unnorm",
        "plus",
        16,
        20,
        422_765_824,
        (HIDDEN,),
        FACES,
        SDXL,
    ),
    Published(
        "ip-adapter", "plus", 16, 20, 422_765_824, (HIDDEN,), FACES, SDXL, known_as="InstantID"
    ),
    Published(
        "ip-adapter-instruct-sd15",
        "instruct",
        16,
        12,
        88_054_272,
        INSTRUCT,
        instruct(SD15, 1280, 768, 12),
        known_as="IP-Adapter-Instruct for SD 1.5",
    ),
    Published(
        "ip-adapter-instruct-sdxl",
        "instruct",
        16,
        20,
        530_636_544,
        INSTRUCT,
        instruct(SDXL, 1280, 1280, 20),
        SDXL,
        known_as="IP-Adapter-Instruct for SDXL",
    ),
]
by_file = pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.file)


def write_sparse(path, shapes):
    """A safetensors file of zeros in half precision."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)


@by_file
def test_inspect(published, tmp_path):
    path = tmp_path / f"{published.file}.safetensors"
    shapes = published.shapes()
    write_sparse(path, shapes)
    info = inspect(path)
    assert (info.layout, info.dtype) == ("official", "float16")
    assert info.variant == published.variant
    assert info.published_name == (published.known_as or published.file)
    assert (
        info.base_family
        == {
            768: "Stable Diffusion 1.x",
            2048: "Stable Diffusion XL",
        }[published.text_dim]
    )
    assert info.cross_attention_dim == published.text_dim
    assert info.num_tokens == published.tokens
    assert info.num_sites == {768: 16, 2048: 70}[published.text_dim]
    assert info.num_heads == published.heads
    assert info.num_layers == (4 if published.heads else None)
    assert info.lora_rank == published.lora_rank
    assert info.num_parameters == published.parameters
    assert tuple(feature.name for feature in info.features) == published.reads


def test_the_generation_of_face_id_plus_is_in_the_name(tmp_path):
    names = {p.file: p for p in PUBLISHED if p.variant == "faceid-plus"}
    for name, published in names.items():
        path = tmp_path / f"{name}.fp16.safetensors"
        write_sparse(path, published.shapes())
        assert inspect(path).published_name == name
    write_sparse(path, names["ip-adapter-faceid-plus_sd15"].shapes())
    assert inspect(path).published_name == "ip-adapter-faceid-plusv2_sd15"  # the name decides
    renamed = tmp_path / "face.safetensors"
    for name, shortcut in (("plusv2_sdxl", True), ("plusv2_sd15", False)):
        write_sparse(renamed, names[f"ip-adapter-faceid-{name}"].shapes())
        assert inspect(renamed).shortcut is shortcut  # of SDXL only the second is known


def test_the_portrait_of_instantids_sizes_is_known_by_its_name(tmp_path):
    [published] = [one for one in PUBLISHED if one.file.endswith("_unnorm")]
    told = {}
    for name in (published.file, "ip-adapter"):
        path = tmp_path / f"{name}.safetensors"
        write_sparse(path, published.shapes())
        told[name] = read_adapter(path, with_values=False).adapter.metadata
    assert told[published.file] == {"reads": "raw id_embeds", "published": published.file}
    assert told["ip-adapter"] == {"reads": "raw id_embeds"}


@by_file
def test_two_dicts(published):
    """As `.bin` holds them; values are not needed to know what it is."""
    with torch.device("meta"):
        content = {"image_proj": {}, "ip_adapter": {}}
        for key, shape in published.shapes().items():
            part, name = key.split(".", 1)
            content[part][name] = torch.empty(shape)
    adapter = build(to_official(content, {}).tensors)
    assert (adapter.variant, adapter.num_tokens) == (published.variant, published.tokens)


def test_a_bin_file_at_true_size(tmp_path):
    content = {"image_proj": {}, "ip_adapter": {}}
    for key, shape in PUBLISHED[0].shapes().items():
        part, name = key.split(".", 1)
        content[part][name] = torch.zeros(shape, dtype=torch.float16)
    path = tmp_path / "ip-adapter_sd15.bin"
    torch.save(content, path)
    info = inspect(path)
    assert (info.variant, info.num_parameters, info.dtype) == ("base", 22_319_616, "float16")
    assert round(info.size_bytes / 1e6, 1) == 44.7
    assert load_adapter(path, dtype=None).num_tokens == 4


def unet_on_meta(**config):
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def test_site_names_are_those_of_the_real_architectures():
    sd15 = unet_on_meta(cross_attention_dim=768)
    sdxl = unet_on_meta(
        cross_attention_dim=2048,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
    )
    for unet, widths in ((sd15, SD15_SITES), (sdxl, SDXL_SITES)):
        cross = [site for site in attention_sites(unet) if site.is_cross]
        assert [site.inner_dim for site in cross] == widths
        assert known_site_names(cross[0].text_dim) == [(s.name, s.inner_dim) for s in cross]
    assert known_site_names(64) == []
