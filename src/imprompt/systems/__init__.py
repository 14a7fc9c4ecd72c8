"""One file per published system: what trains, its loss, what it saves."""
