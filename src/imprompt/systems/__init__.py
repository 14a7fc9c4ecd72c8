"""One file per published system: what trains, its loss, what it saves."""

from imprompt.systems.protocol import System

__all__ = ["System"]
