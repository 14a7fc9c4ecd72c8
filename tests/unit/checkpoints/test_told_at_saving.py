"""Names of parts in older files, and what a file says of itself."""

import torch

from imprompt.checkpoints import inspect, load_adapter, save_adapter


def test_adapter_modules_are_another_name(base_adapter, tmp_path):
    parts = {"image_proj": {}, "adapter_modules": {}}
    for key, tensor in base_adapter.state_dict().items():
        part, name = key.split(".", 1)
        parts["adapter_modules" if part == "ip_adapter" else part][name] = tensor
    torch.save(parts, tmp_path / "a.bin")
    assert load_adapter(tmp_path / "a.bin").variant == "base"


def test_what_is_told_at_saving_wins(base_adapter, tmp_path):
    base_adapter.metadata["base"] = "where it began"
    save_adapter(base_adapter, tmp_path / "a.safetensors", {"base": "where it was trained"})
    assert inspect(tmp_path / "a.safetensors").metadata["base"] == "where it was trained"
