"""Damaged, foreign and unwritable files: one clear line each, and nothing half-written."""

import errno
import shutil
import struct
import zipfile
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from imprompt.adapters.weights import LowRankLayer
from imprompt.checkpoints import inspect, load_adapter, save_adapter
from imprompt.core import tensor_files
from imprompt.core.errors import ImpromptError


def save(adapter, path, *, without=(), extra=()):
    state = {k: v for k, v in adapter.state_dict().items() if k not in without}
    save_file(state | dict(extra), path)
    return path


def test_inspect(make_adapter, tmp_path):
    path = tmp_path / "a.safetensors"
    adapter = make_adapter("instruct")
    adapter.metadata["base"] = "diorama"
    save_adapter(adapter, path)
    info = inspect(path)
    assert (info.variant, info.num_tokens, info.num_sites, info.lora_rank) == ("instruct", 16, 4, 0)
    assert (info.cross_attention_dim, info.dtype) == (64, "float32")
    assert info.num_parameters == sum(p.numel() for p in adapter.parameters())
    assert info.metadata["base"] == "diorama"
    assert [f.name for f in info.features] == [
        "hidden_states",
        "instruction_states",
        "prompt_states",
    ]


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ("base", "image_proj.norm.bias"),
        ("base", "ip_adapter.3.to_v_ip.weight"),
        ("plus", "image_proj.layers.2.0.to_kv.weight"),
        ("full", "image_proj.proj.2.bias"),
        ("faceid", "ip_adapter.4.to_out_lora.up.weight"),
        ("faceid-plus", "image_proj.perceiver_resampler.proj_in.bias"),
        ("instruct", "image_proj.prompt_layers.3.1.1.weight"),
    ],
)
def test_a_missing_key_is_named(make_adapter, tmp_path, variant, key):
    path = save(make_adapter(variant), tmp_path / "a.safetensors", without=[key])
    with pytest.raises(ImpromptError, match=f"nearest variant is {variant}, .*lacks {key}"):
        load_adapter(path)


def test_an_unexpected_key_is_named(base_adapter, tmp_path):
    path = save(
        base_adapter, tmp_path / "a.safetensors", extra={"image_proj.gate.weight": torch.ones(2)}
    )
    with pytest.raises(ImpromptError, match=r"besides which it has image_proj\.gate\.weight"):
        load_adapter(path)


def test_only_one_half(base_adapter, tmp_path):
    for part in ("image_proj", "ip_adapter"):
        gone = [key for key in base_adapter.state_dict() if key.startswith(part)]
        path = save(base_adapter, tmp_path / "a.safetensors", without=gone)
        with pytest.raises(ImpromptError, match=rf"lacks {part}\."):
            load_adapter(path)


def test_shapes_that_do_not_belong_together(base_adapter, tmp_path):
    for key, tensor in {
        "image_proj.norm.bias": torch.ones(3),
        "ip_adapter.1.to_v_ip.weight": torch.ones(8, 63),
        "image_proj.proj.weight": torch.ones(7),
        "image_proj.norm.weight": torch.tensor(1.0),
    }.items():
        path = save(base_adapter, tmp_path / "a.safetensors", extra={key: tensor})
        with pytest.raises(ImpromptError, match="damaged"):
            load_adapter(path)


def test_numbers_that_are_not_finite(base_adapter, tmp_path):
    broken = base_adapter.state_dict()["ip_adapter.1.to_k_ip.weight"].clone()
    broken[0, 0] = float("nan")
    path = save(
        base_adapter, tmp_path / "a.safetensors", extra={"ip_adapter.1.to_k_ip.weight": broken}
    )
    with pytest.raises(ImpromptError, match=r"not finite in ip_adapter\.1\.to_k_ip"):
        load_adapter(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"<html>404</html>" * 9,
        b"PK\x03\x04 cut",
        b"\x80\x02}q\x00cut",
        b"\xff" * 99,
    ],
)
def test_other_kinds_of_files(tmp_path, content):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ImpromptError, match="cannot be read as a checkpoint"):
        load_adapter(path)


def test_truncated(base_adapter, tmp_path):
    path = save(base_adapter, tmp_path / "a.safetensors")
    whole = path.read_bytes()
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ImpromptError, match="half-written"):
            load_adapter(path)
    torch.save({"image_proj": {}, "ip_adapter": {}}, tmp_path / "a.bin")
    cut = (tmp_path / "a.bin").read_bytes()[:-50]
    (tmp_path / "a.bin").write_bytes(cut)
    with pytest.raises(ImpromptError, match="half-written"):
        load_adapter(tmp_path / "a.bin")


def test_git_lfs_pointer(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ImpromptError, match="git lfs pull"):
        load_adapter(path)


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"image_proj": Evil()}, tmp_path / "a.bin")
    with pytest.raises(ImpromptError):
        load_adapter(tmp_path / "a.bin")
    assert not (tmp_path / "owned").exists()


def parts(adapter):
    content = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in adapter.state_dict().items():
        part, name = key.split(".", 1)
        content[part][name] = tensor.detach()
    return content


def test_an_archive_that_unpacks_to_more_than_it_is(base_adapter, tmp_path):
    path = tmp_path / "a.bin"
    content = parts(base_adapter)
    content["ip_adapter"]["1.to_k_ip.weight"] = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save(content, path)
    with pytest.raises(ImpromptError, match=r"a\.bin .*1\.to_k_ip\.weight .* only declared"):
        load_adapter(path)

    shared = torch.zeros(300, 64)
    for index in range(1, 201, 2):
        for part in ("to_k_ip", "to_v_ip"):
            content["ip_adapter"][f"{index}.{part}.weight"] = shared
    torch.save(content, path)
    with pytest.raises(ImpromptError, match="15,[0-9,]+ bytes of weights in a file of"):
        load_adapter(path)

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(ImpromptError, match="compressed archive"):
        load_adapter(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 10))
    whole = path.read_bytes()
    path.write_bytes(
        whole.replace(struct.pack("<II", 1 << 10, 1 << 10), struct.pack("<II", 0, 1 << 30))
    )
    with pytest.raises(ImpromptError, match="declares 1,073,741,824 bytes"):
        load_adapter(path)


def test_what_is_missed_of_the_sites(make_adapter, base_adapter, tmp_path):
    """Weights of a UNet's sites belong together, in number, width and rank."""
    last = [f"ip_adapter.7.{part}.weight" for part in ("to_k_ip", "to_v_ip")]
    path = tmp_path / "a.safetensors"
    save_adapter(base_adapter, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = {k: v for k, v in base_adapter.state_dict().items() if k not in last}
    save_file(state, path, metadata)
    with pytest.raises(ImpromptError, match=r"lacks ip_adapter\.7\.to_k_ip"):
        load_adapter(path)

    adapter = make_adapter("faceid")
    small = LowRankLayer(8, 8, 1)
    adapter.ip_adapter["2"].to_q_lora = small
    with pytest.raises(ImpromptError, match="shapes|ranks"):
        load_adapter(save(adapter, path))


def test_the_end_of_a_known_model_is_missed(tmp_path):
    """Stable Diffusion 1.5 has 16 sites; without a word of ours in the file that is the measure."""
    state = {
        "image_proj.proj.weight": torch.zeros(3072, 1),
        "image_proj.proj.bias": torch.zeros(3072),
    }
    state |= {f"image_proj.norm.{name}": torch.zeros(768) for name in ("weight", "bias")}
    for position, width in enumerate([320, 320, 640]):
        for part in ("to_k_ip", "to_v_ip"):
            state[f"ip_adapter.{2 * position + 1}.{part}.weight"] = torch.zeros(width, 768)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ImpromptError, match=r"ends after 3 of the 16 .*Stable Diffusion 1"):
        load_adapter(tmp_path / "a.safetensors")


def test_a_message_holds_no_control_characters(base_adapter, tmp_path):
    name = "image_proj.\x1b[31m\n" + "x" * 5000
    path = save(base_adapter, tmp_path / "a.safetensors", extra={name: torch.ones(1)})
    with pytest.raises(ImpromptError) as caught:
        load_adapter(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_another_model(tmp_path):
    save_file({"down_blocks.0.lora.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ImpromptError, match=r"no image-prompt adapter: its 1 tensors"):
        load_adapter(tmp_path / "a.safetensors")
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(ImpromptError):
        load_adapter(tmp_path / "list.bin")


def test_no_such_file(tmp_path):
    with pytest.raises(ImpromptError, match="does not exist"):
        load_adapter(tmp_path / "a.safetensors")
    (tmp_path / "b.bin").touch()
    with pytest.raises(ImpromptError, match=r"is a folder; give a file of it \(b\.bin\)"):
        load_adapter(tmp_path)


def test_only_safetensors_is_written(base_adapter, tmp_path):
    with pytest.raises(ImpromptError, match=r"\.safetensors"):
        save_adapter(base_adapter, tmp_path / "a.bin")


def test_full_disk(base_adapter, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_adapter(base_adapter, path)
    whole = path.read_bytes()

    usage = namedtuple("usage", "total used free")(10, 10, 0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ImpromptError, match="disk is full"):
            save_adapter(base_adapter, path)

    def half_a_file(_, target, metadata):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", half_a_file)
        with pytest.raises(ImpromptError, match="disk is full"):
            save_adapter(base_adapter, path)
    assert path.read_bytes() == whole  # the file that was there is still whole
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_others_may_read_it_as_any_new_file(base_adapter, tmp_path):
    (tmp_path / "any").touch()
    save_adapter(base_adapter, tmp_path / "a.safetensors")
    of_any, of_ours = ((tmp_path / name).stat().st_mode for name in ("any", "a.safetensors"))
    assert of_ours == of_any


def test_a_place_that_cannot_be(base_adapter, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ImpromptError, match="was not written"):
        save_adapter(base_adapter, tmp_path / "file" / "a.safetensors")
