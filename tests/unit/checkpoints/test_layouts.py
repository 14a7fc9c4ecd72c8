"""Every layout is read, and ours is read by others."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from imprompt.adapters import create_adapter
from imprompt.adapters.sites import attention_sites
from imprompt.checkpoints import inspect, load_adapter, save_adapter
from imprompt.checkpoints.identity import reads_faces
from imprompt.checkpoints.unet_names import block_order
from imprompt.cli.main import main
from imprompt.core.errors import ImpromptError
from imprompt.core.shipped import ADAPTERS, shipped

DIFFUSERS_VARIANTS = ["base", "plus", "full", "faceid", "faceid-plus"]


def nested(adapter):
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in adapter.state_dict().items():
        part, name = key.split(".", 1)
        parts[part][name] = tensor
    return parts


def assert_same(first, second):
    assert first.variant == second.variant
    assert first.projection.features == second.projection.features
    expected, actual = first.state_dict(), second.state_dict()
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


def test_native(adapter, tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    save_adapter(adapter, path, {"base": "diorama"})
    loaded = load_adapter(path)
    assert_same(adapter, loaded)
    assert inspect(path).layout == "native"
    assert loaded.metadata["base"] == "diorama"
    assert set(load_file(path)) == set(adapter.state_dict())  # exactly the official keys
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_official_safetensors(adapter, tmp_path):
    save_file(adapter.state_dict(), tmp_path / "a.safetensors")
    assert_same(adapter, load_adapter(tmp_path / "a.safetensors"))
    assert inspect(tmp_path / "a.safetensors").layout == "official"


def test_official_bin(adapter, tmp_path):
    torch.save(nested(adapter), tmp_path / "a.bin")
    assert_same(adapter, load_adapter(tmp_path / "a.bin"))
    assert inspect(tmp_path / "a.bin").layout == "official"
    assert_same(adapter, load_adapter(str(tmp_path / "a.bin")))


def test_a_header_whose_length_begins_like_a_pickle(base_adapter, tmp_path):
    path = tmp_path / "a.safetensors"
    for length in range(256):
        save_file(base_adapter.state_dict(), path, {"note": "x" * length})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert_same(base_adapter, load_adapter(path))


def test_the_ending_does_not_matter(base_adapter, tmp_path):
    torch.save(nested(base_adapter), tmp_path / "a.safetensors")
    assert_same(base_adapter, load_adapter(tmp_path / "a.safetensors"))


def test_state_of_the_authors_training_scripts(adapter, tiny_unet, tmp_path):
    state = {f"unet.{key}": tensor for key, tensor in tiny_unet.state_dict().items()}
    for key, tensor in adapter.state_dict().items():
        key = key.replace("image_proj.", "image_proj_model.", 1)
        state[key.replace("ip_adapter.", "adapter_modules.", 1)] = tensor
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(adapter, load_adapter(tmp_path / "pytorch_model.bin"))
    assert inspect(tmp_path / "pytorch_model.bin").layout == "training"


def test_training_state_in_safetensors(base_adapter, tmp_path):
    """Shared tensors keep only the first of their names there: the UNet's."""
    names = {1: "down_blocks.0.attentions.0", 7: "mid_block.attentions.0"}
    names |= {3: "up_blocks.1.attentions.0", 5: "up_blocks.1.attentions.1"}
    state = {}
    for key, tensor in base_adapter.state_dict().items():
        if key.startswith("image_proj."):
            state[key.replace("image_proj.", "image_proj_model.", 1)] = tensor
        else:
            _, index, part = key.split(".", 2)
            name = names[int(index)]
            state[f"unet.{name}.transformer_blocks.0.attn2.processor.{part}"] = tensor
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    assert_same(base_adapter, load_adapter(path))
    save_file({k: v for k, v in state.items() if "unet." not in k}, path)
    with pytest.raises(ImpromptError, match=r"pytorch_model\.bin"):
        load_adapter(path)


@pytest.mark.parametrize("variant", DIFFUSERS_VARIANTS)
def test_diffusers_reads_ours_and_we_read_its(variant, make_adapter, tiny_unet, tmp_path):
    adapter = make_adapter(variant)
    if variant.startswith("faceid"):  # its LoRA is no part of that layout
        for key in [k for k in adapter.ip_adapter if int(k) % 2 == 0]:
            del adapter.ip_adapter[key]
        for weights in adapter.site_weights.values():
            for part in ("to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora"):
                delattr(weights, part)
            weights.lora_rank = 0
    path = tmp_path / "a.safetensors"
    save_adapter(adapter, path)
    loaded = load_adapter(path)
    assert_same(adapter, loaded)

    theirs = copy.deepcopy(tiny_unet)
    theirs._load_ip_adapter_weights([nested(loaded)])
    save_file(theirs.state_dict(), tmp_path / "unet.safetensors")
    assert_same(adapter, load_adapter(tmp_path / "unet.safetensors"))
    assert inspect(tmp_path / "unet.safetensors").layout == "diffusers"

    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn((2, 257, f.dim) if f.is_sequence else (2, f.dim), generator=generator)
        for f in adapter.projection.features
    ]
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 7, 64)
    if variant == "faceid-plus":
        theirs.encoder_hid_proj.image_projection_layers[0].clip_embeds = features[1][:, None]
    with torch.no_grad(), loaded.install(tiny_unet) as handle:
        condition = handle.condition(loaded.tokens(*features))
        ours = tiny_unet(*inputs, cross_attention_kwargs=condition).sample
        embeds = {"image_embeds": [features[0][:, None]]}
        expected = theirs(*inputs, added_cond_kwargs=embeds).sample
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_two_adapters_in_one_unet(base_adapter, tiny_unet, tmp_path):
    theirs = copy.deepcopy(tiny_unet)
    theirs._load_ip_adapter_weights([nested(base_adapter)] * 2)
    torch.save(theirs.state_dict(), tmp_path / "unet.bin")
    with pytest.raises(ImpromptError, match="2 adapters"):
        load_adapter(tmp_path / "unet.bin")


def test_sites_that_are_not_the_odd_ones(tmp_path):
    """A UNet with blocks of self-attention alone counts otherwise; our files tell how."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=2,
    )
    adapter = create_adapter(unet, "base", feature_dim=24)
    assert 2 in adapter.site_weights
    for layout in ("native", "official"):
        save_adapter(adapter, tmp_path / "a.safetensors", layout=layout)
        assert_same(adapter, load_adapter(tmp_path / "a.safetensors"))
    names = [site.name for site in attention_sites(unet) if site.is_cross]
    with pytest.raises(ImpromptError, match="other attention layers"):
        save_adapter(adapter, tmp_path / "a.safetensors", layout="diffusers", site_names=names)


def test_order_of_blocks(tiny_unet):
    names = [name for name in tiny_unet.attn_processors if "attn2" in name]
    assert sorted(sorted(names), key=block_order) == names
    assert block_order("up_blocks.2.attentions.0") < block_order("up_blocks.10.attentions.0")


def test_convert_half_precision(base_adapter, tmp_path):
    save_adapter(base_adapter, tmp_path / "half.safetensors", dtype=torch.float16)
    assert inspect(tmp_path / "half.safetensors").dtype == "float16"
    loaded = load_adapter(tmp_path / "half.safetensors")
    assert next(loaded.parameters()).dtype == torch.float32
    loaded = load_adapter(tmp_path / "half.safetensors", dtype=None)
    assert next(loaded.parameters()).dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("ip-adapter-faceid-plusv2_sd15.bin", None, True),
        ("ip-adapter-faceid-plus_sd15.bin", None, False),
        ("a.safetensors", {"shortcut": "true"}, True),
        ("plusv2.safetensors", {"shortcut": "false"}, False),
        ("renamed.bin", None, False),
    ],
)
def test_the_generation_of_face_id_plus(make_adapter, tmp_path, name, metadata, expected):
    adapter = make_adapter("faceid-plus")
    save_file(adapter.state_dict(), tmp_path / name, metadata)
    loaded = load_adapter(tmp_path / name)
    assert loaded.image_proj.shortcut is expected
    save_adapter(loaded, tmp_path / "again.safetensors")
    assert load_adapter(tmp_path / "again.safetensors").image_proj.shortcut is expected


def test_the_generation_may_be_said(make_adapter, tmp_path, capsys):
    adapter = make_adapter("faceid-plus")
    save_file(adapter.state_dict(), tmp_path / "renamed.safetensors")
    assert load_adapter(tmp_path / "renamed.safetensors", shortcut=True).image_proj.shortcut
    assert main(["inspect", str(tmp_path / "renamed.safetensors")]) == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("generation")]
    assert "first" in line and "shortcut=True" in line
    save_adapter(make_adapter("base"), tmp_path / "base.safetensors")
    with pytest.raises(ImpromptError, match="only faceid-plus"):
        load_adapter(tmp_path / "base.safetensors", shortcut=True)


def test_only_files_of_others_are_taken_for_instant_id(tiny_unet, tmp_path):
    """Its file is known by a width that an image encoder of ours may have as well."""
    adapter = create_adapter(tiny_unet, "plus", feature_dim=512, depth=1)
    assert not reads_faces(adapter)
    save_adapter(adapter, tmp_path / "own.safetensors")
    assert not reads_faces(load_adapter(tmp_path / "own.safetensors"))
    save_adapter(adapter, tmp_path / "published.safetensors", layout="official")
    published = load_adapter(tmp_path / "published.safetensors")
    assert reads_faces(published)
    save_adapter(published, tmp_path / "converted.safetensors")
    assert reads_faces(load_adapter(tmp_path / "converted.safetensors"))


def test_the_shipped_adapter_has_a_name():
    import imprompt

    adapter = imprompt.load_adapter("diorama")
    expected = load_adapter(shipped(ADAPTERS["diorama"]))
    assert adapter.state_dict().keys() == expected.state_dict().keys()
    adapter.check_fits(attention_sites(imprompt.load_base("diorama").unet))
