"""`imprompt convert`: every way there and back is exact, and a training's state becomes an adapter."""

import copy
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_base import write_tiny_base
from torch import nn

from imprompt.adapters import VARIANTS, create_adapter
from imprompt.adapters.sites import attention_sites
from imprompt.bases import load_base
from imprompt.checkpoints import inspect, load_adapter, save_adapter
from imprompt.cli.main import main
from imprompt.core.errors import ImpromptError

DIFFUSERS_VARIANTS = [variant for variant in VARIANTS if variant != "instruct"]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def unet(base_folder):
    return load_base(base_folder).unet


def new_adapter(unet, variant, seed=0, **sizes):
    sizes = {"feature_dim": 24, "id_dim": 20, "lora_rank": 2, "depth": 4} | sizes
    adapter = create_adapter(unet, variant, seed=seed, **sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.parameters():  # so that no two are equal, and LoRA does something
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return adapter


@pytest.fixture
def native(unet, tmp_path):
    def write(variant, **sizes):
        path = tmp_path / f"{variant}.safetensors"
        save_adapter(new_adapter(unet, variant, **sizes), path, {"base": "tiny"})
        return path

    return write


def convert(source, output, *options):
    return main(["convert", str(source), str(output), *map(str, options)])


def refused(capsys, *arguments):
    assert convert(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("imprompt: error: ")
    return lines[0]


def assert_same(first, second):
    expected, actual = load_adapter(first, dtype=None), load_adapter(second, dtype=None)
    assert expected.variant == actual.variant
    assert expected.projection.features == actual.projection.features
    assert expected.state_dict().keys() == actual.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[key], tensor), key
        assert actual.state_dict()[key].dtype == tensor.dtype


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(native, base_folder, tmp_path, variant):
    source = native(variant)
    official, unet_file, back = (tmp_path / f"{name}.safetensors" for name in "abc")
    assert convert(source, official, "--layout", "official") == 0
    assert inspect(official).layout == "official"
    assert_same(source, official)
    last = official
    if variant in DIFFUSERS_VARIANTS:
        options = ("--layout", "diffusers", "--base", base_folder)
        assert convert(official, unet_file, *options) == 0
        assert inspect(unet_file).layout == "diffusers"
        assert_same(source, unet_file)
        last = unet_file
    assert convert(last, back) == 0
    assert_same(source, back)
    assert inspect(back).metadata == inspect(source).metadata


def test_what_the_weights_do_not_tell_is_kept(native, unet, base_folder, tmp_path):
    second = new_adapter(unet, "faceid-plus")
    second.image_proj.shortcut = True
    full = new_adapter(unet, "full", num_tokens=257)
    for number, adapter in enumerate((second, full)):
        save_adapter(adapter, tmp_path / "first.safetensors")
        last = tmp_path / "first.safetensors"
        for layout in ("official", "diffusers", "native"):
            output = tmp_path / f"{number}-{layout}.safetensors"
            options = ("--base", base_folder) if layout == "diffusers" else ()
            assert convert(last, output, "--layout", layout, *options) == 0
            last = output
        loaded = load_adapter(last)
        if adapter is full:
            assert loaded.num_tokens == 257
        else:
            assert loaded.image_proj.shortcut is True


@pytest.fixture
def pipeline(unet):
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4),
        text_encoder=None,
        tokenizer=None,
        unet=copy.deepcopy(unet),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def nested(adapter):
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in adapter.state_dict().items():
        part, name = key.split(".", 1)
        parts[part][name] = tensor
    return parts


@pytest.mark.parametrize("variant", DIFFUSERS_VARIANTS)
def test_diffusers_takes_what_is_written_for_it(
    native, unet, pipeline, base_folder, tmp_path, variant
):
    """A UNet with another adapter of this kind loaded takes the file, and becomes our UNet."""
    if variant.startswith("faceid"):
        pytest.importorskip("peft")
    source, output = native(variant, seed=1), tmp_path / "unet.safetensors"
    assert convert(source, output, "--layout", "diffusers", "--base", base_folder) == 0
    other = new_adapter(unet, variant, seed=2)
    pipeline.load_ip_adapter([nested(other)], None, None, image_encoder_folder=None)
    theirs = pipeline.unet
    names = set(theirs.state_dict())
    state = load_file(output)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    added = {key for key in names if "_ip." in key or "lora_" in key or "image_projection" in key}
    assert added and set(state) == added and not added & set(missing)

    adapter = load_adapter(source)
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn((2, 257, f.dim) if f.is_sequence else (2, f.dim), generator=generator)
        for f in adapter.projection.features
    ]
    if variant == "faceid-plus":
        theirs.encoder_hid_proj.image_projection_layers[0].clip_embeds = features[1][:, None]
    inputs = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 500])
    text = torch.randn(2, 7, adapter.cross_attention_dim, generator=generator)
    with torch.no_grad(), adapter.install(unet) as handle:
        condition = handle.condition(adapter.tokens(*features))
        ours = unet(*inputs, text, cross_attention_kwargs=condition).sample
        embeds = {"image_embeds": [features[0][:, None]]}
        expected = theirs(*inputs, text, added_cond_kwargs=embeds).sample
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_what_diffusers_cannot_hold(native, base_folder, tmp_path, capsys):
    output = tmp_path / "unet.safetensors"
    options = ("--layout", "diffusers", "--base", base_folder)
    assert "no instruct adapter" in refused(capsys, native("instruct"), output, *options)
    assert "4 tokens" in refused(capsys, native("base", num_tokens=8), output, *options)
    assert "4 layers" in refused(capsys, native("plus", depth=2), output, *options)
    assert not output.exists()


def test_a_base_that_is_not_known(native, tmp_path, capsys):
    arguments = native("base"), tmp_path / "unet.safetensors", "--layout", "diffusers"
    assert "--base" in refused(capsys, *arguments)


def test_known_bases_need_no_name(tmp_path):
    names = {"image_proj.proj": (3072, 4), "image_proj.norm": (768,)}
    state = {f"{name}.weight": torch.rand(shape) for name, shape in names.items()}
    state |= {f"{name}.bias": torch.rand(shape[0]) for name, shape in names.items()}
    widths = [320] * 2 + [640] * 2 + [1280] * 5 + [640] * 3 + [320] * 3 + [1280]
    for position, width in enumerate(widths):
        for part in ("to_k_ip", "to_v_ip"):
            state[f"ip_adapter.{2 * position + 1}.{part}.weight"] = torch.rand(width, 768)
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "a.safetensors")
    output = tmp_path / "unet.safetensors"
    assert convert(tmp_path / "a.safetensors", output, "--layout", "diffusers") == 0
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.0.weight" in (
        load_file(output)
    )
    assert_same(tmp_path / "a.safetensors", output)


class Trained(nn.Module):
    """The module of the authors' training scripts: attention processors are in it twice."""

    def __init__(self, unet, adapter):
        super().__init__()
        self.unet = copy.deepcopy(unet)
        sites = [site.name for site in attention_sites(self.unet)]
        processors = {
            f"{name}.processor": adapter.site_weights.get(index, nn.Module())
            for index, name in enumerate(sites)
        }
        self.unet.set_attn_processor(dict(processors))
        self.image_proj_model = adapter.image_proj
        self.adapter_modules = nn.ModuleList(processors.values())


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.mark.parametrize("is_safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_of_accelerate(native, unet, accelerator, tmp_path, variant, is_safe):
    source = native(variant)
    module = accelerator.prepare(Trained(unet, load_adapter(source)))
    accelerator.save_state(str(tmp_path / "state"), safe_serialization=is_safe)
    name = "model.safetensors" if is_safe else "pytorch_model.bin"
    if is_safe:  # the reason why this state is no use elsewhere
        assert not any("adapter_modules" in key for key in load_file(tmp_path / "state" / name))
    for number, state in enumerate((tmp_path / "state", tmp_path / "state" / name)):
        output = tmp_path / f"{number}.safetensors"
        assert convert(state, output) == 0
        assert_same(source, output)
        assert inspect(state).layout == "training" and inspect(output).layout == "native"
    assert module.training


def test_states_of_other_engines(native, unet, tmp_path):
    """Several processes put "module." before every name, DeepSpeed the state into an envelope."""
    source = native("plus")
    state = Trained(unet, load_adapter(source)).state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "ddp.bin")
    folder = tmp_path / "state" / "pytorch_model"
    folder.mkdir(parents=True)
    envelope = {"module": state, "global_steps": 3, "ds_version": "0.19", "optimizer": None}
    torch.save(envelope, folder / "mp_rank_00_model_states.pt")
    compiled = {key.replace("unet.", "unet._orig_mod."): value for key, value in state.items()}
    compiled = {f"module.{k}": v for k, v in compiled.items() if "adapter_modules" not in k}
    save_file(compiled, tmp_path / "compiled.safetensors")
    for name in ("ddp.bin", "state", "compiled.safetensors"):
        assert convert(tmp_path / name, tmp_path / "out.safetensors", "--overwrite") == 0
        assert_same(source, tmp_path / "out.safetensors")


def test_a_state_in_several_files(native, unet, tmp_path, capsys):
    source = native("base")
    state = Trained(unet, load_adapter(source)).state_dict()
    unshared = {key: value for key, value in state.items() if "adapter_modules" not in key}
    folder = tmp_path / "state"
    folder.mkdir()
    keys = sorted(unshared)
    shards = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for name, own in shards.items():
        save_file({key: unshared[key] for key in own}, folder / name)
    places = {key: name for name, own in shards.items() for key in own}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert convert(folder, tmp_path / "out.safetensors") == 0
    assert_same(source, tmp_path / "out.safetensors")

    shutil.move(folder / "model-2.safetensors", tmp_path)
    assert "not beside it" in refused(capsys, folder, tmp_path / "b.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "../model-2.safetensors"}}))
    assert "not beside it" in refused(capsys, folder, tmp_path / "b.safetensors")


def test_it_says_what_was_read_and_written(native, tmp_path, capsys):
    output = tmp_path / "new" / "half.safetensors"
    assert convert(native("plus"), output, "--dtype", "float16", "--layout", "official") == 0
    read, written = capsys.readouterr().out.splitlines()
    assert "native, plus" in read and "float32" in read
    assert str(output) in written and "official, plus" in written and "float16" in written
    with safe_open(output, framework="pt") as file:
        assert file.metadata()["format"] == "pt" and file.metadata()["base"] == "tiny"


def test_numbers_too_large_for_the_type(native, tmp_path, capsys):
    source = native("base")
    state = load_file(source)
    state["image_proj.proj.bias"][0] = 1e6
    save_file(state, source)
    output = tmp_path / "out.safetensors"
    line = refused(capsys, source, output, "--dtype", "float16")
    assert "too large" in line and "image_proj.proj.bias" in line
    assert not output.exists()
    assert convert(source, output, "--dtype", "bfloat16") == 0


def test_nothing_is_overwritten_unasked(native, tmp_path, capsys):
    source = native("base")
    before = source.read_bytes()
    assert "--overwrite" in refused(capsys, source, source)
    assert source.read_bytes() == before
    assert convert(source, source, "--overwrite", "--dtype", "float16") == 0
    assert inspect(source).dtype == "float16"


def test_mistakes(native, tmp_path, capsys):
    source = native("base")
    assert "only format written" in refused(capsys, source, tmp_path / "a.bin")
    assert "does not exist" in refused(capsys, tmp_path / "no.bin", tmp_path / "a.safetensors")
    assert "--layout diffusers" in refused(
        capsys, source, tmp_path / "a.safetensors", "--base", "tiny"
    )
    with pytest.raises(ImpromptError, match='layout is "onnx"; written are native'):
        save_adapter(load_adapter(source), tmp_path / "a.safetensors", layout="onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors"]
