"""The adapters that come with the package for the diorama base.

All raise an ImpromptError where this installation has none.
"""

from pathlib import Path

from imprompt.core.shipped import shipped


def shipped_adapter() -> Path:
    """The image-prompt adapter, trained longer than the quickstart's."""
    return shipped("diorama-ip-adapter.safetensors")


def shipped_instruct_adapter() -> Path:
    """The Instruct adapter: it is told what to take from an image."""
    return shipped("diorama-ip-adapter-instruct.safetensors")


def shipped_identity() -> Path:
    """The folder of identity adapter and IdentityNet."""
    return shipped("diorama-identity")
