"""Files are there whole or not at all."""

import errno
import json

import pytest

from imprompt.core.errors import ImpromptError, first_line
from imprompt.core.files import disk_errors, is_disk_full, write_json, write_whole


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"λ": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"λ": 1}

    def write(file):
        file.write(b"half of")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ImpromptError, match=r"a\.json: No space left.* Make room"):
        write_whole(path, write)
    assert json.loads(path.read_text(encoding="utf-8")) == {"λ": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_disk_says(tmp_path):
    with pytest.raises(ImpromptError, match=r"Cannot write .*missing.*: No such file or directory"):
        write_whole(tmp_path / "missing" / "a", lambda file: file.write(b""))
    without_number = OSError("no words of the system's")
    with (
        pytest.raises(ImpromptError, match=r"Cannot write .*: no words of the system's\.$"),
        disk_errors(tmp_path),
    ):
        raise without_number
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(PermissionError(errno.EACCES, "Permission denied"))


@pytest.mark.parametrize(
    ("message", "quoted"), [("\n It broke.\nBadly.", "It broke"), ("", "ValueError")]
)
def test_the_first_line_of_an_error(message, quoted):
    assert first_line(ValueError(message)) == quoted
