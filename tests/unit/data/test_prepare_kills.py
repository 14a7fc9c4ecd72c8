"""kill -9 at random moments of `imprompt prepare`: the folder ends as if nothing had happened.

Five kills; twenty with IMPROMPT_SLOW_TESTS=1.
"""

import json
import tarfile

from killing import NUM_KILLS, run_once, run_with_kills
from pair_files import add_member, contents, picture, write_pair

from imprompt.data.dataset import Columns

NUM_PAIRS = 240

# Progress is kept every few seconds; here nearly always, so that kills fall between and within.
SCRIPT = """
import sys
from imprompt.cli.main import main
from imprompt.data import encoding
encoding.SAVE_EVERY_SECONDS = 0.02
raise SystemExit(main(sys.argv[1:]))
"""


def test_a_killed_preparation_ends_as_one_that_was_left_alone(base_folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(NUM_PAIRS // 2):
        write_pair(photos, f"{i}.png", picture(i), f"photo {i}" if i % 9 else "")
    for name in ("a.tar", "b.tar"):
        with tarfile.open(photos / name, "w") as archive:
            for i in range(NUM_PAIRS // 4):
                # Each archive repeats a few pictures of the folder.
                number = i if i % 10 == 0 else 1000 + i + (500 if name == "b.tar" else 0)
                add_member(archive, f"{i}.png", picture(number))
                add_member(archive, f"{i}.txt", f"archived {name} {i}".encode())

    def command(output):
        arguments = ["prepare", str(photos), str(tmp_path / output), "--base", str(base_folder)]
        return ["-c", SCRIPT, *arguments, "--batch-size", "4"]

    def pairs_done():
        done = 0
        for file in (tmp_path / "killed").glob("parts/*/progress.json"):
            done += json.loads(file.read_text())["next_pair"]
        return done

    run_once(command("alone"))
    hits = run_with_kills(command("killed"), pairs_done, total=NUM_PAIRS - 10, seed=3)
    assert hits >= NUM_KILLS - 1
    assert contents(tmp_path / "killed") == contents(tmp_path / "alone")
    assert 150 < len(Columns.open(tmp_path / "killed")) < NUM_PAIRS
