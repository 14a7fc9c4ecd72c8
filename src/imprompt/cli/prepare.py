"""`imprompt prepare`: pairs to cached features."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from imprompt.cli.parsing import at_least, number
from imprompt.cli.verb import (
    add_base_arguments,
    add_image_encoder_argument,
    add_place_arguments,
    add_verb,
    load_placed_base,
    name_and_value,
)
from imprompt.core.progress import say

EXAMPLES = """\
  imprompt prepare photos/ data/            images, each with a .txt of the same name beside it
  imprompt prepare laion/ data/             what img2dataset left: .tar archives or plain files
  imprompt prepare pairs.json data/         a list of image_file and text; also .jsonl .csv .parquet
  imprompt prepare diorama:3000 data/       scenes of the embedded world
  imprompt prepare diorama-instruct:3000 data/ --variant instruct-words
                                            pairs of scenes, and an instruction of what they share
  imprompt prepare diorama-people:8000 people/ --variant identity    its portraits, in twos
only the good ones:
  imprompt prepare laion/ data/ --min-side-px 512 --max-aspect 2 --caption-characters 5 300 \\
      --score "aesthetic>=5" "punsafe<0.3"
with four processes, or as one of eight machines that share a disk:
  imprompt prepare laion/ data/ --workers 4
  imprompt prepare laion/ /shared/data --num-shards 8 --shard 0
for a ControlNet or T2I-Adapter:
  imprompt prepare diorama:8000 data/ --columns latent_mean latent_logvar text_ids control_depth
  imprompt prepare photos/ data/ --map depth=depths/ \\
      --columns latent_mean latent_logvar text_ids control_depth
another adapter's features, added to what is there:
  imprompt prepare laion/ data/ --columns hidden_states

The same command again goes on where it stopped, however it was stopped, and ends with the same result.
What cannot be used is listed with its reason in OUT/quarantine.jsonl and stops nothing."""


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "prepare",
        run,
        about="encode pairs of images and captions once, for any number of trainings",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "source",
        help="folder of images or of .tar archives, .tar, .json, .jsonl, .csv, .tsv or .parquet list, "
        "dataset on disk, or of the embedded world diorama:COUNT, diorama-people:COUNT or "
        "diorama-instruct:COUNT, each with :FIRST_SEED if wanted",
    )
    parser.add_argument("output", type=Path, help="folder of the prepared data")
    add_base_arguments(parser, denoises=False)
    add_image_encoder_argument(parser)
    # What is encoded once is trained on for long, so it is exact.
    add_place_arguments(parser, "float32")
    parser.add_argument(
        "--variant",
        default="base",
        choices=(
            "base",
            "plus",
            "full",
            "instruct",
            "instruct-words",
            "instruct-faces",
            "faceid",
            "faceid-plus",
            "identity",
        ),
        help="which adapter it is for; instruct needs pairs with a condition image",
    )
    parser.add_argument(
        "--size-px", type=at_least(1), help="side of the images (default: the base's)"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=64, help="pairs encoded together (default 64)"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME",
        help="other columns than image prompts need; new ones are added to data that are there",
    )
    parser.add_argument(
        "--face-encoder",
        help="who reads identity vectors: diorama, insightface[:MODEL], or a file (default: diorama for "
        "its own portraits, insightface for photos)",
    )
    reading = parser.add_argument_group("how lists are read")
    reading.add_argument(
        "--image-root",
        type=Path,
        metavar="FOLDER",
        help="what paths in a list are relative to, and may not leave (default: the list's folder)",
    )
    reading.add_argument("--image-key", metavar="NAME", help="the column with the image's path")
    reading.add_argument("--caption-key", metavar="NAME", help="the column with the caption")
    reading.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="KIND=FOLDER",
        help="control maps of the images, under the images' names, for the column control_KIND; may "
        "be repeated",
    )
    wanted = parser.add_argument_group("which pairs are wanted")
    wanted.add_argument(
        "--min-side-px", type=int, default=16, help="width and height at least (default 16)"
    )
    wanted.add_argument(
        "--max-aspect", type=number, help="long side at most so many times the short one"
    )
    wanted.add_argument(
        "--caption-characters",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="length of the caption",
    )
    wanted.add_argument(
        "--score",
        nargs="+",
        default=[],
        metavar="LIMIT",
        help="limits on scores that come with the pairs, such as 'aesthetic>=5' (in quotes)",
    )
    wanted.add_argument(
        "--duplicates",
        default="image",
        choices=("image", "pair", "keep"),
        help="of pairs with the same image file (and reference or condition) keep the first; with `pair`, "
        "those with other captions too; with `keep`, all",
    )
    processes = parser.add_argument_group("several processes")
    processes.add_argument("--workers", type=at_least(1), default=1, help="processes (default 1)")
    processes.add_argument(
        "--num-shards", type=at_least(1), default=1, help="how many such commands share the work"
    )
    processes.add_argument(
        "--shard", type=at_least(0), default=0, help="which of them this is, counted from 0"
    )
    processes.add_argument(
        "--engine",
        default="local",
        choices=("local", "ray"),
        help="where the workers are: here, or tasks of a Ray cluster",
    )


def run(arguments: argparse.Namespace) -> None:
    say("loading…")
    from imprompt.data.dataset import Columns
    from imprompt.data.filters import Filters, ScoreLimit
    from imprompt.data.prepare import prepare
    from imprompt.data.records import Reading

    if arguments.engine == "ray" and arguments.device is None:
        arguments.device = "cpu"  # what Ray's tasks have been given
    shortest, longest = arguments.caption_characters or (1, None)
    filters = Filters(
        min_side_px=arguments.min_side_px,
        max_aspect=arguments.max_aspect,
        min_caption_characters=shortest,
        max_caption_characters=longest,
        scores=tuple(ScoreLimit.parse(limit) for limit in arguments.score),
        duplicates=arguments.duplicates,
    )
    prepare(
        arguments.source,
        arguments.output,
        load_placed_base(arguments, half_on_gpu=False),
        columns=None if arguments.columns is None else tuple(arguments.columns),
        variant=arguments.variant,
        size_px=arguments.size_px,
        batch_size=arguments.batch_size,
        filters=filters,
        reading=Reading(
            image_root=arguments.image_root,
            image_key=arguments.image_key,
            caption_key=arguments.caption_key,
            maps={
                kind: Path(folder)
                for kind, folder in (
                    name_and_value(text, "--map", "KIND=FOLDER") for text in arguments.map
                )
            },
        ),
        workers=arguments.workers,
        num_shards=arguments.num_shards,
        shard=arguments.shard,
        engine=arguments.engine,
        face_encoder=arguments.face_encoder,
    )
    count = len(Columns.open(arguments.output)) if (arguments.output / "meta.json").exists() else 0
    print(f"prepared: {arguments.output}" + (f" ({count:,} pairs)" if count else ""))
