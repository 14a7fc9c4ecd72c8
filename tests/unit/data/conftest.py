import sys
from pathlib import Path

import pytest
from tiny_base import write_tiny_base

from imprompt.bases import load_base

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def base(base_folder):
    return load_base(base_folder)
