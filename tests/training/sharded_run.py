"""Started by torchrun: a short run with fsdp2, in which the frozen blocks must be slices after each use."""

import sys
from pathlib import Path

from torch.distributed.tensor import DTensor

from imprompt.training import run
from imprompt.training.denoiser import blocks_of
from imprompt.training.sharded import ShardedEngine

folder, output = Path(sys.argv[1]), Path(sys.argv[2])
bases = []
load_base, loss = run.load_base, ShardedEngine.loss


def keep_base(*arguments, **options):
    bases.append(load_base(*arguments, **options))
    return bases[0]


def checked_loss(engine, *arguments, **options):
    result = loss(engine, *arguments, **options)
    for block in blocks_of(bases[0].unet):
        assert all(isinstance(p, DTensor) for p in block.parameters()), type(block).__name__
    return result


run.load_base, ShardedEngine.loss = keep_base, checked_loss
run.run_training(
    "image-prompt",
    data=folder / "data",
    base=str(folder / "base"),
    output=output,
    settings=[*sys.argv[3:], "train.validation_rows=0", "train.steps=2"],
    engine="fsdp2",
    num_processes=2,
)
