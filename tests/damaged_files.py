"""Ways to damage an adapter's file as such: cut it, fill it with more than it holds, make it run
code, or put something else in its place. As in `damaged_tensors.py`, none leaves a valid file.
"""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save, save_file

# --- half of a file, and flipped bits ---


def truncated_safetensors(case):
    whole = save(case.state)
    case.path.write_bytes(whole[: case.random.randrange(len(whole))])


def truncated_archive(case):
    whole = case.archive()
    case.path.write_bytes(whole[: case.random.randrange(len(whole))])


def flipped_bit_in_the_header(case):
    whole = bytearray(save(case.state))
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    whole[case.random.randrange(end)] ^= 1 << case.random.randrange(8)
    case.path.write_bytes(whole)


def flipped_bit_in_the_directory_of_an_archive(case):
    whole = bytearray(case.archive())
    end = whole.rindex(b"PK\x05\x06")
    whole[end + case.random.randrange(4)] ^= 1 << case.random.randrange(8)
    case.path.write_bytes(whole)


def overwritten_stretch(case):
    whole = bytearray(case.archive())
    start = whole.index(b"image_proj")
    length = case.random.randrange(8, 200)
    whole[start : start + length] = case.random.randbytes(length)
    case.path.write_bytes(whole)


# --- made to fill the memory ---


def compressed_archive(case):
    if case.random.random() < 0.5:  # else all is well but for the compression
        case.state[case.pick()] = torch.zeros(1 << 22)  # 16 MB in a few kB
    with (
        zipfile.ZipFile(io.BytesIO(case.archive())) as source,
        zipfile.ZipFile(case.path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)


def archive_that_declares_too_much(case):
    whole = bytearray(case.archive())
    entry = whole.rindex(b"PK\x01\x02")
    size = case.random.choice([1 << 20, 1 << 28, (1 << 32) - 2])
    whole[entry + 20 : entry + 28] = struct.pack("<II", size, size)
    case.path.write_bytes(whole)


def few_numbers_that_claim_to_be_many(case):
    key = case.pick()
    right = case.state[key].shape  # all is well but for the memory
    shape = case.random.choice([right, (1 << 16, 1 << 16), (1 << 30, 1 << 30)])
    case.state[key] = torch.zeros(1).expand(shape)
    torch.save(case.nested(), case.path)


def many_names_for_the_same_numbers(case):
    if case.adapter.lora_rank:  # missing at the added sites; there is nothing to show
        case.state = {k: v for k, v in case.state.items() if "_lora" not in k}
    shared = torch.zeros(300, 64)
    for index in range(1, 1001, 2):
        for part in ("to_k_ip", "to_v_ip"):
            case.state[f"ip_adapter.{index}.{part}.weight"] = shared
    torch.save(case.nested(), case.path)


def old_format_that_declares_too_much(case):
    buffer = io.BytesIO()
    torch.save(
        {"image_proj": {}, "x": torch.zeros(7)}, buffer, _use_new_zipfile_serialization=False
    )
    whole = buffer.getvalue()
    # A storage's size is a pickled int: BININT1 7 becomes LONG1 2**50.
    assert whole.count(b"K\x07") >= 1
    case.path.write_bytes(whole.replace(b"K\x07", b"\x8a\x07" + (1 << 50).to_bytes(7, "little")))


def storage_that_declares_too_much(case):
    buffer = io.BytesIO()
    torch.save({"image_proj": {}, "x": torch.zeros(7)}, buffer)
    with (
        zipfile.ZipFile(buffer) as source,
        zipfile.ZipFile(case.path, "w") as target,
    ):
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert content.count(b"K\x07") >= 1
                number = case.random.choice([8, 1 << 12, 1 << 28])
                content = content.replace(b"K\x07", b"J" + number.to_bytes(4, "little"))
            target.writestr(entry.filename, content)


def tensors_without_memory(case):
    key, value = case.pick(), torch.eye(3)
    kinds = [
        value.to_sparse(),
        torch.empty(1 << 20, 1 << 20, device="meta"),
        torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    ]
    case.state[key] = case.random.choice(kinds)
    torch.save(case.nested(), case.path)


# --- made to be executed ---


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled_code(case):
    touch = f"open({str(case.touched)!r}, 'w')"
    payload = case.random.choice(
        [
            Payload(open, str(case.touched), "w"),
            Payload(os.system, f"touch '{case.touched}'"),
            Payload(eval, touch),
            Payload(exec, touch),
            Payload(getattr(pickle, "loads"), pickle.dumps(Payload(eval, touch))),  # noqa: B009
        ]
    )
    content = case.nested()
    place = case.random.randrange(4)
    if place == 0:
        content["image_proj"]["extra"] = payload
    elif place == 1:
        content["epoch"] = payload
    elif place == 2:
        content = payload
    else:
        content = {"state_dict": content, "optimizer": [payload]}
    kind = case.random.randrange(3)
    if kind == 0:
        torch.save(content, case.path)
    elif kind == 1:
        torch.save(content, case.path, _use_new_zipfile_serialization=False)
    else:
        protocol = case.random.choice([2, 3, 4, 5])
        case.path.write_bytes(pickle.dumps(payload, protocol))


# --- something else ---


def another_kind_of_file(case):
    def image(form):
        Image.new("RGB", (9, 9)).save(buffer, form)

    def tar():
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(__file__, "pickle")

    def archive_of(name):
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(name, "<xml/>")

    buffer = io.BytesIO()
    make = case.random.choice(
        [
            lambda: image("PNG"),
            lambda: image("JPEG"),
            tar,
            lambda: archive_of("word/document.xml"),
            lambda: archive_of("archive/data.pkl"),
            lambda: np.savez(buffer, a=np.zeros(3)),
            lambda: np.save(buffer, np.zeros(3)),
            lambda: buffer.write(gzip.compress(case.archive())),
            lambda: buffer.write(b"<!doctype html><title>404</title>"),
            lambda: buffer.write(b"GGUF\x03\0\0\0" + bytes(64)),
            lambda: buffer.write(case.random.randbytes(case.random.randrange(4000))),
            lambda: buffer.write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
            lambda: buffer.write(json.dumps({"image_proj": 1}).encode()),
            lambda: buffer.write(b"\x80" + case.random.randbytes(200)),
        ]
    )
    make()
    case.path.write_bytes(buffer.getvalue())


def another_content(case):
    content = case.random.choice(
        [
            [1, 2],
            3,
            None,
            "image_proj",
            {},
            {1: torch.ones(2)},
            {"image_proj": 3, "ip_adapter": None},
            {"image_proj": {}, "ip_adapter": {}},
            {"image_proj": {2: torch.ones(2)}, "ip_adapter": {}},
            {"state_dict": 5},
            {"state_dict": {"state_dict": {}}},
            {"module": [torch.ones(2)]},
            torch.ones(3),
            {"unet.conv_in.weight": torch.ones(2)},
            {"adapter_modules.1.to_k_ip.weight": torch.ones(2, 2)},
            {"image_proj_model.proj.weight": torch.ones(2, 2)},
            {"encoder_hid_proj.image_projection_layers.0.x": torch.ones(2)},
            {"down_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 2)},
        ]
    )
    torch.save(content, case.path)


def damaged_unet_state(case):
    if case.adapter.variant == "instruct":  # which diffusers has not
        return another_content(case)
    state = case.write_unet()
    projection = sorted(key for key in state if key.startswith("encoder_hid_proj"))
    cross = sorted(key for key in state if "_ip.0." in key)
    kind = case.random.randrange(6)
    if kind == 0:
        del state[case.random.choice(projection)]
    elif kind == 1:
        del state[case.random.choice(cross)]
    elif kind == 2:  # a second adapter
        key = case.random.choice(projection)
        state[key.replace("layers.0.", "layers.1.")] = state[key].clone()
    elif kind == 3:  # a UNet's layer without the adapter
        own = "mid_block.attentions.7.transformer_blocks.0.attn2.to_k.weight"
        state[own] = torch.ones(2, 2)
    elif kind == 4:  # under diffusers' name and the training scripts'
        key = case.random.choice(cross)
        state[key.replace("_ip.0.", "_ip.")] = state[key].clone()
    else:
        key = case.random.choice(projection)
        state[key] = state[key][None].clone()
    save_file(state, case.path)


DAMAGES = (
    truncated_safetensors,
    truncated_archive,
    flipped_bit_in_the_header,
    flipped_bit_in_the_directory_of_an_archive,
    overwritten_stretch,
    compressed_archive,
    archive_that_declares_too_much,
    few_numbers_that_claim_to_be_many,
    many_names_for_the_same_numbers,
    old_format_that_declares_too_much,
    storage_that_declares_too_much,
    tensors_without_memory,
    pickled_code,
    another_kind_of_file,
    another_content,
    damaged_unet_state,
)
