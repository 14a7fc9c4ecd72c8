"""What a run can be told, on a system that trains in milliseconds."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_system import SmallSystem, write_numbers

from imprompt.core.errors import ImpromptError
from imprompt.systems.denoising import mean_in_parts
from imprompt.systems.face_encoder import FaceEncoderOptions
from imprompt.systems.image_prompt import ImagePromptOptions
from imprompt.systems.instruct_options import InstructOptions
from imprompt.systems.text_to_image import TextToImageOptions
from imprompt.training import log
from imprompt.training.batches import batches
from imprompt.training.config import TrainConfig
from imprompt.training.loop import train
from imprompt.training.order import rows_of_samples
from imprompt.training.speed import FlopCount, Speed
from imprompt.training.state import whole_checkpoints

CONFIG = {
    "steps": 12,
    "batch_size": 6,
    "learning_rate": 0.05,
    "validation_rows": 4,
    "validate_every_steps": 3,
    "checkpoint_every_steps": 5,
    "log_every_steps": 4,
    "report_to": "none",
}


@pytest.fixture
def columns(tmp_path):
    return write_numbers(tmp_path / "data")


def run(columns, output, system=None, **changes):
    return train(system or SmallSystem(), columns, TrainConfig(**{**CONFIG, **changes}), output)


def test_the_best_weights_are_those_of_the_best_validation(columns, tmp_path):
    run(columns, tmp_path / "run", learning_rate=0.5, steps=30)
    lines = [n for n in log.read(tmp_path / "run/log.jsonl") if "validation_error" in n]
    best = min(lines, key=lambda line: line["validation_error"])
    kept = json.loads((tmp_path / "run/best/best.json").read_text())
    assert kept == {"step": best["step"], "by": "error", "value": best["validation_error"]}
    system = SmallSystem()
    system.module.load_state_dict(load_file(tmp_path / "run/best/export"))
    everything = columns.rows(range(60, 64), ("x", "y"))
    assert system.validate(everything, None)["error"] == pytest.approx(kept["value"])


def test_the_best_may_be_the_highest_and_an_unknown_figure_is_told(columns, tmp_path):
    run(columns, tmp_path / "run", best_by="highest:error")
    kept = json.loads((tmp_path / "run/best/best.json").read_text())
    errors = [line.get("validation_error", 0) for line in log.read(tmp_path / "run/log.jsonl")]
    assert kept["value"] == max(errors)
    with pytest.raises(ImpromptError, match="'beauty'; validation gives error"):
        run(columns, tmp_path / "other", best_by="lowest:beauty")
    assert not (
        tmp_path / "other/log.jsonl"
    ).exists()  # told before the first step, not at a validation
    with pytest.raises(ImpromptError, match="write lowest:NAME"):
        TrainConfig(steps=1, best_by="beauty")


def test_a_loss_that_is_not_finite_names_the_rows_and_saves_nothing_of_it(columns, tmp_path):
    rows = ", ".join(map(str, rows_of_samples(range(45, 48), 60, 0)))
    with pytest.raises(ImpromptError, match=f"step 7 .samples 45 to 47, rows {rows}.") as error:
        run(
            columns, tmp_path / "run", SmallSystem(fail_at_sample=46), gradient_accumulation_steps=2
        )
    assert "samples 42" not in str(error.value)
    saved = whole_checkpoints(tmp_path / "run/checkpoints")
    assert [path.name for path in saved] == ["step-00000005"]


@pytest.mark.parametrize("step", [4, 6])  # the last before a checkpoint, and another
def test_a_gradient_that_is_not_finite_is_told_before_it_is_saved(columns, tmp_path, step):
    rows = ", ".join(map(str, rows_of_samples(range(6 * step, 6 * step + 6), 60, 0)))
    system = SmallSystem(fail_gradient_at_sample=6 * step + 1)
    with pytest.raises(ImpromptError, match=rf"norm nan at step {step} \(.*, rows {rows}\)"):
        run(columns, tmp_path / "run", system)
    saved = whole_checkpoints(tmp_path / "run/checkpoints")
    assert [path.name for path in saved] == (["step-00000005"] if step > 4 else [])
    assert all(v.isfinite().all() for v in load_file(tmp_path / "run/best/export").values())


def test_a_figure_that_is_not_finite_is_never_the_best(columns, tmp_path):
    system = SmallSystem()
    validate, steps = system.validate, iter(range(4))
    system.validate = lambda batch, randomness: (
        validate(batch, randomness) if next(steps) else {"error": float("nan")}
    )
    system.export = lambda path: path.write_text(str(system.module.weight.sum().item()))
    run(columns, tmp_path / "run", system)
    assert json.loads((tmp_path / "run/best/best.json").read_text())["step"] > 3
    system, kept = SmallSystem(), (tmp_path / "run/best/best.json").read_text()
    system.validate = lambda batch, randomness: {"error": float("nan")}
    run(columns, tmp_path / "run", system, keep_checkpoints=3)
    assert (tmp_path / "run/best/best.json").read_text() == kept


def test_a_picture_that_cannot_be_drawn_is_told_and_the_run_goes_on(columns, tmp_path, capsys):
    def preview():
        return torch.cat([torch.zeros(1, 2), torch.zeros(1, 3)])

    train(SmallSystem(), columns, TrainConfig(**CONFIG), tmp_path / "run", preview=preview)
    assert "no preview at step 12: RuntimeError: Sizes of tensors" in capsys.readouterr().err
    assert not (tmp_path / "run/previews").exists()


def test_half_precision_with_a_scaled_loss_learns_and_goes_on_exactly(columns, tmp_path):
    straight = load_file(run(columns, tmp_path / "straight", precision="float16"))
    run(columns, tmp_path / "again", precision="float16")
    newest = whole_checkpoints(tmp_path / "again/checkpoints")[-1]
    assert "scaler" in json.loads((newest / "counters.json").read_text())
    (newest / "counters.json").unlink()
    resumed = load_file(run(columns, tmp_path / "again", precision="float16"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert (tmp_path / "straight/log.jsonl").read_text() == (
        tmp_path / "again/log.jsonl"
    ).read_text()
    lines = [
        line["validation_error"]
        for line in log.read(tmp_path / "straight/log.jsonl")
        if "validation_error" in line
    ]
    assert lines[-1] < lines[0]


def test_how_far_ahead_is_read_and_by_how_many_changes_no_batch(columns):
    def rows(read_ahead, num_processes, num_parts):
        options = {"num_rows": 60, "seed": 1, "batch_size": 12, "first_step": 3, "last_step": 9}
        shares = [
            list(
                batches(
                    columns,
                    ("x",),
                    **options,
                    process=process,
                    num_processes=num_processes,
                    num_parts=num_parts,
                    read_ahead=read_ahead,
                )
            )
            for process in range(num_processes)
        ]
        return [
            [row for share in shares for part in share[step] for row in part.rows.tolist()]
            for step in range(6)
        ]

    expected = rows(1, 1, 1)
    assert expected == rows(4, 1, 1) == rows(2, 2, 1) == rows(1, 3, 2) == rows(3, 1, 4)
    assert [len(step) for step in expected] == [12] * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw-8bit"}, "needs bitsandbytes and a GPU"),
        ({"gradient_checkpointing": True}, "this has none"),
        ({"compile_blocks": True}, "this has none"),
        ({"report_to": "carrier-pigeon"}, "no tracker 'carrier-pigeon'"),
        ({"report_to": "wandb"}, "wandb is not installed"),
        ({"gradient_accumulation_steps": 4}, "must be a multiple of 4"),
    ],
)
def test_what_cannot_be_done_here_is_told(columns, tmp_path, changes, message):
    if changes.get("report_to") == "wandb":
        import importlib.util

        if importlib.util.find_spec("wandb"):
            pytest.skip("wandb is installed")
    if changes.get("optimizer") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ImpromptError, match=message):
        run(columns, tmp_path / "run", **changes)


def test_what_can_be_validated_in_parts_is(columns, tmp_path):
    system = SmallSystem()
    system.rows_at_once = None
    sizes, errors = [], []

    def validate(batch, randomness):
        def error(rows, randomness, weights):
            sizes.append(len(rows["x"]))
            noisy = rows["x"] + randomness.normal("noise", (3,))
            return weights * (system.module(noisy) - rows["y"]).square()[:, 0]

        weights = torch.arange(float(len(batch["x"])))
        for at_once in (None, system.rows_at_once):
            errors.append(mean_in_parts(error, batch, randomness, weights, rows_at_once=at_once))
        return {"error": errors[-1]}

    system.validate = validate
    run(
        columns, tmp_path / "run", system, steps=3, validation_rows=8, gradient_accumulation_steps=2
    )
    assert sizes == [8, 3, 3, 2]  # of a share of 6 in two parts
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_what_changes_nothing_may_change_when_a_run_goes_on(columns, tmp_path):
    straight = load_file(run(columns, tmp_path / "straight"))
    run(columns, tmp_path / "run")
    for path in whole_checkpoints(tmp_path / "run/checkpoints")[1:]:
        (path / "counters.json").unlink()
    changes = {"gradient_accumulation_steps": 3, "keep_checkpoints": 5, "read_ahead": 1}
    resumed = load_file(run(columns, tmp_path / "run", **changes))
    for name in straight:
        torch.testing.assert_close(straight[name], resumed[name], atol=1e-6, rtol=1e-5)


def test_where_rows_are_coupled_a_batch_keeps_its_parts(columns, tmp_path):
    system = SmallSystem()
    system.rows_are_coupled = True
    run(columns, tmp_path / "run", system)
    with pytest.raises(ImpromptError, match="num_parts was 1, now 3"):
        run(columns, tmp_path / "run", system, gradient_accumulation_steps=3)
    described = json.loads((tmp_path / "run/run.json").read_text())
    del described["num_parts"]  # as it was written before it was known of
    (tmp_path / "run/run.json").write_text(json.dumps(described))
    with pytest.raises(ImpromptError, match="num_parts was 1, now 2"):
        run(columns, tmp_path / "run", system, gradient_accumulation_steps=2)
    run(columns, tmp_path / "run", system)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (TrainConfig, {"validation_rows": -1}, "validation_rows is -1, but must be at least 0"),
        (TrainConfig, {"ema_decay": 1.5}, "ema_decay is 1.5, but must be at least 0 and below 1"),
        (TrainConfig, {"beta2": 1.0}, "beta2 is 1.0"),
        (TrainConfig, {"max_gradient_norm": -1.0}, "max_gradient_norm is -1.0"),
        (TrainConfig, {"weight_decay": -1.0}, "weight_decay is -1.0"),
        (TrainConfig, {"learning_rate": float("nan")}, "learning_rate is nan"),
        (TrainConfig, {"learning_rate": float("inf")}, "learning_rate is inf, but must be finite"),
        (TrainConfig, {"frozen_precision": "bfloat16"}, "set precision=bfloat16, too"),
        (ImagePromptOptions, {"drop_image": 5.0}, "drop_image is 5.0, but must be .* at most 1"),
        (ImagePromptOptions, {"drop_image": 0.6, "drop_text": 0.6}, "are 1.25 together"),
        (InstructOptions, {"drop_all": -0.1}, "drop_all is -0.1"),
        (InstructOptions, {"depth": 0}, "depth is 0, but must be at least 1"),
        (TextToImageOptions, {"drop_caption": 2.0}, "drop_caption is 2.0"),
        (FaceEncoderOptions, {"margin": 4.0}, "margin is 4.0, but must be below 3.14159"),
    ],
)
def test_impossible_values_are_told(kind, changes, message):
    given = {"steps": 1, **changes} if kind is TrainConfig else changes
    with pytest.raises(ImpromptError, match=message):
        kind(**given)


def test_a_run_that_an_older_version_began_goes_on(columns, tmp_path):
    run(columns, tmp_path / "run")
    described = json.loads((tmp_path / "run/run.json").read_text())
    for name in ("best_by", "optimizer", "frozen_precision"):
        del described["config"][name]
    (tmp_path / "run/run.json").write_text(json.dumps(described))
    run(columns, tmp_path / "run")


def test_a_log_line_that_was_being_written_is_written_again(columns, tmp_path):
    run(columns, tmp_path / "run")
    log_file = tmp_path / "run/log.jsonl"
    whole = log_file.read_text()
    checkpoint = whole_checkpoints(tmp_path / "run/checkpoints")[-1]
    (checkpoint / "counters.json").unlink()
    log_file.write_text(whole[:-20])
    run(columns, tmp_path / "run")
    assert log_file.read_text() == whole


def test_work_is_counted_without_being_changed():
    layer = torch.nn.Linear(20, 30)
    values = torch.randn(7, 20)
    plain = layer(values)
    with FlopCount() as count:
        counted = layer(values)
        counted.sum().backward()
    assert torch.equal(plain, counted)
    assert count.total == 2 * 7 * 20 * 30 * 2  # forward, and the gradient of the weights
    query = torch.randn(1, 2, 8, 16)
    with FlopCount() as count, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert count.total == 2 * 2 * 2 * 8 * 8 * 16


def test_utilisation_is_of_what_a_matrix_product_reaches_here():
    speed = Speed(torch.device("cpu"), torch.float32, num_processes=1)
    assert "utilisation" not in speed.look(1)
    speed.flops_per_sample = 1e6
    figures = speed.look(1000)
    assert figures["samples_per_second"] > 0 and figures["utilisation"] > 0
