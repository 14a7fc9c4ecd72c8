"""The adapters that come with the package for the diorama base.

All raise an ImpromptError where this installation has none.
"""

from pathlib import Path

from imprompt.core.shipped import ADAPTERS, IDENTITIES, shipped


def shipped_adapter() -> Path:
    """The image-prompt adapter, trained longer than the quickstart's."""
    return shipped(ADAPTERS["diorama"])


def shipped_instruct_adapter() -> Path:
    """The Instruct adapter: it is told what to take from an image."""
    return shipped(ADAPTERS["diorama-instruct"])


def shipped_identity() -> Path:
    """The folder of identity adapter and IdentityNet."""
    return shipped(IDENTITIES["diorama"])
