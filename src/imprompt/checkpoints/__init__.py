"""File formats of adapters, apart from the adapters themselves."""

from imprompt.checkpoints.files import AdapterInfo, inspect, load_adapter, save_adapter

__all__ = ["AdapterInfo", "inspect", "load_adapter", "save_adapter"]
