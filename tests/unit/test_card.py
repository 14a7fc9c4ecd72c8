"""The card that a run leaves could be published as it is."""

import json

import pytest

from imprompt.training.card import write_card


@pytest.mark.parametrize(
    ("system", "name", "use"),
    [
        ("image-prompt", "adapter.safetensors", 'load_adapter("adapter.safetensors")'),
        ("controlnet", "control", 'load_control("control")'),
        ("identity", "identity", 'load_identity("identity")'),
    ],
)
def test_a_card_is_read_by_people(system, name, use, tmp_path):
    run = tmp_path / "first"
    (run / "best").mkdir(parents=True)
    (run / "log.jsonl").write_text('{"step": 3000, "validation_loss": 0.5, "loss": 0.4}\n')
    best = {"step": 3000, "by": "validation_loss", "value": 0.5125}
    (run / "best/best.json").write_text(json.dumps(best, indent=2))
    data = {
        "count": 6,
        "filters": {"min_side_px": 16, "max_aspect": None, "scores": []},
        "reading": {"image_root": None},
        "parts": ["laion", "coyo"],
    }
    card = write_card(
        run,
        run / name,
        system=system,
        base="diorama",
        base_fingerprint="0123",
        data=data,
        settings={"train": {"steps": 3}},
        preset=None,
    ).read_text()
    assert " for diorama: first\n" in card and use in card
    assert "validation loss was 0.5125 at step 3,000." in card
    before_settings = card.partition("## Settings")[0]
    assert "{" not in before_settings and "None" not in before_settings
    assert "- filters: min_side_px 16\n- parts: laion, coyo\n" in card and "reading" not in card
