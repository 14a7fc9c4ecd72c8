"""File formats of adapters and controls, apart from the adapters and controls themselves."""

from imprompt.checkpoints.controls import LoadedControl, load_control, shipped_controls
from imprompt.checkpoints.files import AdapterInfo, inspect, load_adapter, save_adapter

__all__ = [
    "AdapterInfo",
    "LoadedControl",
    "inspect",
    "load_adapter",
    "load_control",
    "save_adapter",
    "shipped_controls",
]
