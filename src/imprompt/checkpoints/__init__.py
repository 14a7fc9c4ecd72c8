"""File formats of adapters and controls, apart from the adapters and controls themselves."""

from imprompt.checkpoints.controls import LoadedControl, load_control, shipped_controls
from imprompt.checkpoints.files import AdapterInfo, inspect, load_adapter, save_adapter
from imprompt.checkpoints.identity import Identity, load_identity

__all__ = [
    "AdapterInfo",
    "Identity",
    "LoadedControl",
    "inspect",
    "load_adapter",
    "load_control",
    "load_identity",
    "save_adapter",
    "shipped_controls",
]
