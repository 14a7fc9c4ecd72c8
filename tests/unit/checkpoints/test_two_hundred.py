"""Two hundred damaged files: each refused in one line, none executed, none loaded half.

Each kind of damage below is a function of random numbers. A damage that may leave a valid file (a
flipped bit of a weight, say) is none; every kind here leaves something wrong. What the messages
say of single mistakes is tested in `test_damage.py`.
"""

import gzip
import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from imprompt.adapters import VARIANTS, create_adapter
from imprompt.adapters.sites import attention_sites
from imprompt.checkpoints import inspect, load_adapter, save_adapter
from imprompt.core.errors import ImpromptError

NUM_FILES = 200
DAMAGES = []


def damage(function):
    DAMAGES.append(function)
    return function


class Case:
    """A whole adapter, random numbers, and a place for the damaged file."""

    def __init__(self, adapter, site_names, number, folder):
        self.adapter = adapter
        self.site_names = site_names
        self.random = random.Random(number)
        self.state = {key: value.detach() for key, value in adapter.state_dict().items()}
        self.path = folder / self.random.choice(["a.safetensors", "a.bin", "a.pt", "a"])
        self.touched = folder / "touched"

    def pick(self, *, ndim=None):
        keys = [key for key, value in self.state.items() if ndim in (None, value.ndim)]
        return self.random.choice(sorted(keys))

    def nested(self):
        parts = {"image_proj": {}, "ip_adapter": {}}
        for key, tensor in self.state.items():
            part, name = key.split(".", 1)
            parts.setdefault(part, {})[name] = tensor
        return parts

    def archive(self):
        """What `torch.save` writes."""
        buffer = io.BytesIO()
        torch.save(self.nested(), buffer)
        return buffer.getvalue()

    def header(self):
        """Header and weights of the safetensors file, the header as a dict."""
        whole = save(self.state)
        end = 8 + struct.unpack("<Q", whole[:8])[0]
        return json.loads(whole[8:end]), whole[end:]

    def write_header(self, header, weights, length=None):
        text = header if isinstance(header, str) else json.dumps(header)
        size = struct.pack("<Q", len(text) if length is None else length)
        self.path.write_bytes(size + text.encode() + weights)

    def write(self):
        """One of the two layouts that hold the changed tensors as they are."""
        if self.random.random() < 0.5:
            torch.save(self.nested(), self.path)
        else:
            # A native file tells its sites, so that even a whole site that is gone is missed.
            native = self.path.with_suffix(".safetensors")
            save_adapter(self.adapter, native)
            with_metadata = {"sites": inspect(native).metadata["sites"], "format": "imprompt"}
            native.unlink()
            state = {key: value.contiguous() for key, value in self.state.items()}
            save_file(state, self.path, with_metadata)

    def write_unet(self):
        """The adapter inside a UNet's state, to be damaged there."""
        path = self.path.with_name("unet.safetensors")
        save_adapter(self.adapter, path, layout="diffusers", site_names=self.site_names)
        state = {key: value.clone() for key, value in load_file(path).items()}
        path.unlink()
        return state


# --- half of a file, and flipped bits ---


@damage
def truncated_safetensors(case):
    whole = save(case.state)
    case.path.write_bytes(whole[: case.random.randrange(len(whole))])


@damage
def truncated_archive(case):
    whole = case.archive()
    case.path.write_bytes(whole[: case.random.randrange(len(whole))])


@damage
def flipped_bit_in_the_header(case):
    whole = bytearray(save(case.state))
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    whole[case.random.randrange(end)] ^= 1 << case.random.randrange(8)
    case.path.write_bytes(whole)


@damage
def flipped_bit_in_the_directory_of_an_archive(case):
    whole = bytearray(case.archive())
    end = whole.rindex(b"PK\x05\x06")
    whole[end + case.random.randrange(4)] ^= 1 << case.random.randrange(8)
    case.path.write_bytes(whole)


@damage
def overwritten_stretch(case):
    whole = bytearray(case.archive())
    start = whole.index(b"image_proj")
    length = case.random.randrange(8, 200)
    whole[start : start + length] = case.random.randbytes(length)
    case.path.write_bytes(whole)


# --- the wrong tensors under the names, or the wrong names ---


@damage
def shuffled_keys(case):
    keys = sorted(case.state)
    turn = case.random.randrange(1, len(keys))
    turned = {k: case.state[keys[(i + turn) % len(keys)]] for i, k in enumerate(keys)}
    assert any(turned[key].shape != case.state[key].shape for key in keys)
    case.state = {key: value.clone() for key, value in turned.items()}
    case.write()


@damage
def renamed_key(case):
    key = case.pick()
    place = case.random.randrange(len(key))
    other = key[:place] + case.random.choice("xQ\u00e4\n\x1b.") + key[place + 1 :]
    case.state[other] = case.state.pop(key)
    case.write()


@damage
def renumbered_site(case):
    sites = sorted({key.split(".")[1] for key in case.state if key.startswith("ip_adapter.")})
    old = case.random.choice(sites)
    new = case.random.choice(["01", "99999", "-1", "2222", "x"])
    case.state = {
        key.replace(f"ip_adapter.{old}.", f"ip_adapter.{new}."): value
        for key, value in case.state.items()
    }
    case.write()


@damage
def missing_keys(case):
    for _ in range(case.random.randint(1, 3)):
        del case.state[case.pick()]
    case.write()


@damage
def missing_site(case):
    cross = sorted(i for i, site in case.adapter.site_weights.items() if site.is_cross)
    gone = f"ip_adapter.{case.random.choice(cross[:-1])}."
    case.state = {key: value for key, value in case.state.items() if not key.startswith(gone)}
    case.write()


@damage
def extra_keys(case):
    for _ in range(case.random.randint(1, 50)):
        name = "".join(case.random.choices("abc.\n\x1b[31m", k=case.random.choice([3, 30, 3000])))
        case.state[case.random.choice(["image_proj.", "ip_adapter.1.", "x."]) + name] = torch.ones(
            2
        )
    case.write()


@damage
def duplicated_site(case):
    number = case.random.choice(["01", "001", "2", "100", "1.1"])
    copied = {k: v for k, v in case.state.items() if k.startswith("ip_adapter.1.")}
    for key, value in copied.items():
        case.state[key.replace(".1.", f".{number}.", 1)] = value.clone()
    if number == "2" and case.adapter.lora_rank:  # there it only adds K' and V'
        assert "ip_adapter.2.to_k_ip.weight" in case.state
    case.write()


@damage
def the_same_name_twice(case):
    header, weights = case.header()
    first, second = case.random.sample(sorted(header), 2)
    text = json.dumps(header).replace(f'"{first}"', f'"{second}"')
    case.write_header(text, weights)


@damage
def two_names_for_one_tensor(case):
    key = case.pick()
    case.state = {f"{prefix}{k}": v for k, v in case.state.items() for prefix in ("", "module.")}
    assert key in case.state
    torch.save(dict(case.state), case.path)


# --- the wrong numbers ---


@damage
def wrong_shape(case):
    key = case.pick(ndim=2)
    value = case.state[key]
    choices = [value[None], value.flatten(), value[0], value[:-1], value[..., None], value.sum()]
    case.state[key] = case.random.choice(choices[:3] + choices[4:]).clone()
    if len(value) > 1 and case.random.random() < 0.3:
        case.state[key] = value[:-1].clone()
    case.write()


@damage
def site_of_another_width(case):
    index = case.random.choice([i for i, s in case.adapter.site_weights.items() if s.is_cross])
    for part in ("to_k_ip", "to_v_ip"):
        key = f"ip_adapter.{index}.{part}.weight"
        case.state[key] = case.state[key][:, :-1].clone()
    case.write()


@damage
def empty_tensor(case):
    value = case.state[key := case.pick()]
    case.state[key] = value.new_zeros([0, *value.shape[1:]])
    case.write()


@damage
def not_finite(case):
    value = case.state[key := case.pick()].clone()
    number = case.random.choice([float("nan"), float("inf"), float("-inf")])
    value.flatten()[case.random.randrange(value.numel())] = number
    case.state[key] = value.half() if case.random.random() < 0.3 else value
    case.write()


@damage
def not_floating_point(case):
    key = case.pick()
    kinds = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn]
    case.state[key] = case.state[key].to(case.random.choice(kinds))
    case.write()


@damage
def all_integers(case):
    case.state = {key: (value * 50).to(torch.int8) for key, value in case.state.items()}
    case.write()


# --- what it says of itself ---


@damage
def metadata_that_lies(case):
    choices = [{"sites": s} for s in ("", "1,x", "1,3", "1,3,5,7,9", "²", "9" * 5000, "\x1b,\n")]
    wrong = case.random.choice([v for v in VARIANTS if v != case.adapter.variant])
    choices += [{"variant": wrong}, {"variant": "\n" * 900 + "x"}]
    save_file(case.state, case.path, {"format": "imprompt"} | case.random.choice(choices))


@damage
def header_of_false_sizes(case):
    header, weights = case.header()
    entry = header[case.random.choice(sorted(header))]
    kind = case.random.randrange(6)
    if kind == 0:
        entry["shape"] = [1 << 40, 1 << 40]
    elif kind == 1:
        entry["shape"] = [0, 1 << 62]
    elif kind == 2:
        entry["data_offsets"] = [0, 1 << 44]
    elif kind == 3:
        entry["data_offsets"] = [8, 0]
    elif kind == 4:
        entry["dtype"] = case.random.choice(["F4096", "", 7, None])
    else:
        entry["shape"] = [-1, -1]
    case.write_header(header, weights)


@damage
def header_of_a_false_length(case):
    header, weights = case.header()
    length = case.random.choice([0, 1, 1 << 31, 1 << 62, (1 << 64) - 1])
    case.write_header(header, weights, length)


@damage
def header_that_never_ends(case):
    depth = 100_000
    case.write_header('{"a":' + "[" * depth, b"")


# --- made to fill the memory ---


@damage
def compressed_archive(case):
    case.state[case.pick()] = torch.zeros(1 << 22)  # 16 MB in a few kB
    with (
        zipfile.ZipFile(io.BytesIO(case.archive())) as source,
        zipfile.ZipFile(case.path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)


@damage
def archive_that_declares_too_much(case):
    whole = bytearray(case.archive())
    entry = whole.rindex(b"PK\x01\x02")
    size = case.random.choice([1 << 20, 1 << 28, (1 << 32) - 2])
    whole[entry + 20 : entry + 28] = struct.pack("<II", size, size)
    case.path.write_bytes(whole)


@damage
def few_numbers_that_claim_to_be_many(case):
    shape = case.random.choice([(1 << 16, 1 << 16), (1 << 30, 1 << 30), (1 << 20, 1 << 12)])
    case.state[case.pick()] = torch.zeros(1).expand(shape)
    torch.save(case.nested(), case.path)


@damage
def many_names_for_the_same_numbers(case):
    if case.adapter.lora_rank:  # missing at the added sites; there is nothing to show
        case.state = {k: v for k, v in case.state.items() if "_lora" not in k}
    shared = torch.zeros(300, 64)
    for index in range(1, 1001, 2):
        for part in ("to_k_ip", "to_v_ip"):
            case.state[f"ip_adapter.{index}.{part}.weight"] = shared
    torch.save(case.nested(), case.path)


@damage
def old_format_that_declares_too_much(case):
    buffer = io.BytesIO()
    torch.save(
        {"image_proj": {}, "x": torch.zeros(7)}, buffer, _use_new_zipfile_serialization=False
    )
    whole = buffer.getvalue()
    # A storage's size is a pickled int: BININT1 7 becomes LONG1 2**50.
    assert whole.count(b"K\x07") >= 1
    case.path.write_bytes(whole.replace(b"K\x07", b"\x8a\x07" + (1 << 50).to_bytes(7, "little")))


@damage
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


@damage
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


@damage
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


@damage
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


@damage
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


@damage
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


@pytest.fixture(scope="module")
def adapters(tiny_unet):
    """One of each variant. diffusers takes resamplers of 4 layers only."""
    return {
        variant: create_adapter(
            tiny_unet, variant, feature_dim=24, id_dim=20, lora_rank=2, resampler_dim=8
        )
        for variant in VARIANTS
    }


def memory_bytes():
    """The most that this process has had so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_two_hundred_damaged_files(adapters, tiny_unet, tmp_path):
    site_names = [site.name for site in attention_sites(tiny_unet) if site.is_cross]
    start, before = time.process_time(), memory_bytes()
    wrong = []
    for number in range(NUM_FILES):
        break_it = DAMAGES[number % len(DAMAGES)]
        variant = VARIANTS[number // len(DAMAGES) % len(VARIANTS)]
        folder = tmp_path / str(number)
        folder.mkdir()
        case = Case(adapters[variant], site_names, number, folder)
        what = f"{number}: {break_it.__name__} of {variant}"
        break_it(case)
        try:
            loaded = load_adapter(case.path)
            wrong.append(f"{what}: loaded as {loaded.variant}")
        except ImpromptError as error:
            message = str(error)
            if "\n" in message or not message.isprintable():
                wrong.append(f"{what}: not one line: {message!r}")
            if len(message.replace(str(folder), "")) >= 600:
                wrong.append(f"{what}: {len(message)} characters: {message}")
        except BaseException as error:
            wrong.append(f"{what}: {type(error).__name__}: {error}")
        if case.touched.exists():
            wrong.append(f"{what}: executed")
    assert not wrong, "\n".join(wrong)
    assert memory_bytes() - before < 250e6
    assert time.process_time() - start < 20


@pytest.mark.parametrize("variant", VARIANTS)
def test_undamaged_they_are_read(adapters, tiny_unet, tmp_path, variant):
    """So it was the damage that was refused."""
    case = Case(adapters[variant], [], 0, tmp_path)
    for _ in range(6):
        case.write()
        assert load_adapter(case.path).variant == variant
    case.path.write_bytes(case.archive())
    assert load_adapter(case.path).variant == variant
    case.write_header(*case.header())
    assert load_adapter(case.path).variant == variant
