"""Ways to damage what an adapter's file holds: names, shapes, numbers, and what it says of itself.

Each is a function of a `Case` and its random numbers. A damage that may leave a valid file (a
flipped bit of a weight, say) is none; every one here leaves something wrong.
"""

import io
import json
import random
import struct

import torch
from safetensors.torch import load_file, save, save_file

from imprompt.adapters import VARIANTS
from imprompt.checkpoints import inspect, save_adapter


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


# --- the wrong tensors under the names, or the wrong names ---


def shuffled_keys(case):
    keys = sorted(case.state)
    turn = case.random.randrange(1, len(keys))
    turned = {k: case.state[keys[(i + turn) % len(keys)]] for i, k in enumerate(keys)}
    assert any(turned[key].shape != case.state[key].shape for key in keys)
    case.state = {key: value.clone() for key, value in turned.items()}
    case.write()


def renamed_key(case):
    key = case.pick()
    place = case.random.randrange(len(key))
    other = key[:place] + case.random.choice("xQ\u00e4\n\x1b.") + key[place + 1 :]
    case.state[other] = case.state.pop(key)
    case.write()


def renumbered_site(case):
    sites = sorted({key.split(".")[1] for key in case.state if key.startswith("ip_adapter.")})
    old = case.random.choice(sites)
    new = case.random.choice(["01", "99999", "-1", "2222", "x"])
    case.state = {
        key.replace(f"ip_adapter.{old}.", f"ip_adapter.{new}."): value
        for key, value in case.state.items()
    }
    case.write()


def missing_keys(case):
    for _ in range(case.random.randint(1, 3)):
        del case.state[case.pick()]
    case.write()


def missing_site(case):
    cross = sorted(i for i, site in case.adapter.site_weights.items() if site.is_cross)
    gone = f"ip_adapter.{case.random.choice(cross[:-1])}."
    case.state = {key: value for key, value in case.state.items() if not key.startswith(gone)}
    case.write()


def extra_keys(case):
    for _ in range(case.random.randint(1, 50)):
        name = "".join(case.random.choices("abc.\n\x1b[31m", k=case.random.choice([3, 30, 3000])))
        case.state[case.random.choice(["image_proj.", "ip_adapter.1.", "x."]) + name] = torch.ones(
            2
        )
    case.write()


def duplicated_site(case):
    number = case.random.choice(["01", "001", "2", "100", "1.1"])
    copied = {k: v for k, v in case.state.items() if k.startswith("ip_adapter.1.")}
    for key, value in copied.items():
        case.state[key.replace(".1.", f".{number}.", 1)] = value.clone()
    if number == "2" and case.adapter.lora_rank:  # there it only adds K' and V'
        assert "ip_adapter.2.to_k_ip.weight" in case.state
    case.write()


def the_same_name_twice(case):
    header, weights = case.header()
    first, second = case.random.sample(sorted(header), 2)
    text = json.dumps(header).replace(f'"{first}"', f'"{second}"')
    case.write_header(text, weights)


def two_names_for_one_tensor(case):
    key = case.pick()
    case.state = {f"{prefix}{k}": v for k, v in case.state.items() for prefix in ("", "module.")}
    assert key in case.state
    torch.save(dict(case.state), case.path)


# --- the wrong numbers ---


def wrong_shape(case):
    key = case.pick(ndim=2)
    value = case.state[key]
    choices = [value[None], value[..., None], value.flatten(), value[0], value[:-1], value.sum()]
    case.state[key] = case.random.choice(choices).clone()
    case.write()


def site_of_another_width(case):
    index = case.random.choice([i for i, s in case.adapter.site_weights.items() if s.is_cross])
    for part in ("to_k_ip", "to_v_ip"):
        key = f"ip_adapter.{index}.{part}.weight"
        case.state[key] = case.state[key][:, :-1].clone()
    case.write()


def empty_tensor(case):
    value = case.state[key := case.pick()]
    case.state[key] = value.new_zeros([0, *value.shape[1:]])
    case.write()


def not_finite(case):
    value = case.state[key := case.pick()].clone()
    number = case.random.choice([float("nan"), float("inf"), float("-inf")])
    value.flatten()[case.random.randrange(value.numel())] = number
    case.state[key] = value.half() if case.random.random() < 0.3 else value
    case.write()


def not_floating_point(case):
    key = case.pick()
    kinds = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn]
    case.state[key] = case.state[key].to(case.random.choice(kinds))
    case.write()


def all_integers(case):
    case.state = {key: (value * 50).to(torch.int8) for key, value in case.state.items()}
    case.write()


# --- what it says of itself ---


def metadata_that_lies(case):
    choices = [{"sites": s} for s in ("", "1,x", "1,3", "1,3,5,7,9", "²", "9" * 5000, "\x1b,\n")]
    wrong = case.random.choice([v for v in VARIANTS if v != case.adapter.variant])
    choices += [{"variant": wrong}, {"variant": "\n" * 900 + "x"}]
    save_file(case.state, case.path, {"format": "imprompt"} | case.random.choice(choices))


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


def header_of_a_false_length(case):
    header, weights = case.header()
    length = case.random.choice([0, 1, 1 << 31, 1 << 62, (1 << 64) - 1])
    case.write_header(header, weights, length)


def header_that_never_ends(case):
    depth = 100_000
    case.write_header('{"a":' + "[" * depth, b"")


DAMAGES = (
    shuffled_keys,
    renamed_key,
    renumbered_site,
    missing_keys,
    missing_site,
    extra_keys,
    duplicated_site,
    the_same_name_twice,
    two_names_for_one_tensor,
    wrong_shape,
    site_of_another_width,
    empty_tensor,
    not_finite,
    not_floating_point,
    all_integers,
    metadata_that_lies,
    header_of_false_sizes,
    header_of_a_false_length,
    header_that_never_ends,
)
