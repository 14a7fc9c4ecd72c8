"""The systems that make the embedded base: each learns, validates and exports what loads again."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns, ColumnsWriter
from imprompt.diorama import (
    COLOURS,
    KINDS,
    SETTINGS,
    STYLES,
    caption,
    render,
    sample_scene,
    subject_caption,
)
from imprompt.evaluation.judge import load_judge
from imprompt.systems import autoencoder, classifier, contrastive, text_to_image
from imprompt.training.run import prepare_run

CAPTIONS = [caption(sample_scene(seed), i) for seed in range(40) for i in range(6)]


@pytest.fixture(scope="module")
def tokenizer():
    return contrastive.train_tokenizer(CAPTIONS)


@pytest.fixture(scope="module")
def batch(tokenizer):
    scenes = [sample_scene(seed) for seed in range(8)]
    pixels = ((render(scenes, 64).pixels + 1) * 127.5).round().to(torch.uint8)
    texts = [caption(scene, i) for scene in scenes for i in range(6)]
    ids = tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt").input_ids
    labels = [
        (
            KINDS.index(s.kind),
            list(COLOURS).index(s.colour),
            STYLES.index(s.style),
            SETTINGS.index(s.setting),
        )
        for s in scenes
    ]
    return {
        "pixels": pixels,
        "phrasing_ids": ids.unflatten(0, (-1, 6)),
        "labels": torch.tensor(labels),
        "latents": torch.randn(8, 8, 16, 16, generator=torch.Generator().manual_seed(0)),
    }


def steps(system, batch, count=6, learning_rate=2e-3):
    """Train on one batch; the losses before and after."""
    optimizer = torch.optim.Adam(system.module.parameters(), lr=learning_rate)
    losses = []
    for _ in range(count):
        loss, _ = system.loss(batch, Randomness(0, range(len(batch["pixels"]))))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_autoencoder(batch, tmp_path):
    torch.manual_seed(0)
    system = autoencoder.AutoencoderSystem(autoencoder.create_autoencoder())
    first, last = steps(system, batch)
    assert last < first
    assert set(system.validate(batch, Randomness(0, range(8)))) == {"l1", "psnr_decibel"}
    system.export(tmp_path / "vae")
    again = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert again.config.latent_channels == 8


def test_scaling_gives_unit_variance(batch):
    module = autoencoder.create_autoencoder()
    pixels = batch["pixels"].float() / 127.5 - 1
    factor = autoencoder.measure_scaling(module, pixels)
    with torch.no_grad():
        latents = module.encode(pixels).latent_dist.mean * factor
    assert latents.std().item() == pytest.approx(1.0, abs=1e-3)


def test_a_wrong_hue_costs_more_than_a_wrong_grey():
    target = torch.zeros(1, 3, 32, 32)
    grey, hue = target + 0.2, target + torch.tensor([0.2, -0.2, 0.0])[None, :, None, None]
    loss = autoencoder.reconstruction_loss
    assert loss(hue, target) > 2 * loss(grey, target)


def test_tokenizer_knows_the_words_and_survives_others(tokenizer):
    words = tokenizer.convert_ids_to_tokens(tokenizer("a red house").input_ids)
    assert words[1:-1] == ["a</w>", "red</w>", "house</w>"]
    strange = tokenizer("zebra! ünïcode 123").input_ids
    assert tokenizer.unk_token_id not in strange[1:-1]


def test_contrastive_towers(tokenizer, batch, tmp_path):
    torch.manual_seed(0)
    system = contrastive.ContrastiveSystem(*contrastive.create_encoders(tokenizer))
    first, last = steps(system, batch, count=10)
    assert last < first
    system.export(tmp_path)
    assert (tmp_path / "text_encoder" / "config.json").is_file()
    assert (tmp_path / "image_encoder" / "config.json").is_file()


def test_an_image_encoder_learns_on_without_forgetting(batch, tmp_path):
    """Rows that show objects stay what they were, and the projection of texts is found again."""
    base = load_base("diorama")
    ids = base.tokenize([subject_caption(sample_scene(seed)) for seed in range(8)])
    writer = ColumnsWriter(tmp_path)
    writer.write(0, {"pixels": batch["pixels"], "subject_ids": ids, "labels": batch["labels"]})
    writer.finish(8, {"encoders_fingerprint": base.encoders_fingerprint()})
    columns = Columns.open(tmp_path)
    rows = columns.rows(range(8), columns.names)
    drawn = Randomness(0, range(8))
    moved = []
    for hold in (0.01, 20.0):
        options = contrastive.ContrastiveOptions(
            start="base", lock_text=True, captions="subject", hold=hold
        )
        system = contrastive.build(options, base, columns)
        text = {name for name, p in system.module.text.named_parameters() if p.requires_grad}
        assert text == {"text_projection.weight"}
        torch.testing.assert_close(
            system.module.text.text_model(input_ids=ids).last_hidden_state,
            base.text_encoder(input_ids=ids).last_hidden_state,
        )
        first = system.validate(rows, drawn)
        assert first["moved"] == pytest.approx(0, abs=1e-6)
        assert first["right"] == 1.0
        steps(system, rows, count=8, learning_rate=1e-3)
        moved.append(system.validate(rows, drawn)["moved"])
    assert moved[1] < 0.5 * moved[0]


def test_portraits_may_move_while_objects_are_held():
    base = load_base("diorama")
    torch.manual_seed(0)
    text, vision = contrastive.create_encoders(base.tokenizer)
    options = contrastive.ContrastiveOptions(start="base", captions="subject", hold=1.0)
    system = contrastive.ContrastiveSystem(text, vision, options, base.image_encoder.model)
    person, duck = KINDS.index("person"), KINDS.index("duck")
    batch = {
        "pixels": torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8),
        "subject_ids": base.tokenize(["a person with dark skin", "a red duck"]),
        "labels": torch.tensor([[person, 0, 0, 0], [person, 0, 0, 0]]),
    }
    assert system.loss(batch, Randomness(0, range(2)))[1]["moved"] == 0
    batch["labels"][1, 0] = duck
    assert system.loss(batch, Randomness(0, range(2)))[1]["moved"] > 0.1


def test_what_is_asked_of_the_encoders_is_checked():
    with pytest.raises(ImpromptError, match="must be one of: whole, subject"):
        contrastive.ContrastiveOptions(captions="half")
    with pytest.raises(ImpromptError, match='needs start="base"'):
        contrastive.ContrastiveOptions(hold=1.0)
    with pytest.raises(ImpromptError, match="hold is -1"):
        contrastive.ContrastiveOptions(start="base", hold=-1.0)


def test_text_to_image(tokenizer, batch, tmp_path):
    torch.manual_seed(0)
    text, _ = contrastive.create_encoders(tokenizer)
    empty = torch.tensor(tokenizer("", padding="max_length", max_length=32).input_ids)
    system = text_to_image.TextToImageSystem(
        text_to_image.create_unet(), text.text_model, empty, text_to_image.create_scheduler()
    )
    first, last = steps(system, batch)
    assert last < first
    figures = system.validate(batch, Randomness(0, range(8)))
    assert set(figures) == {"loss", "loss_without_text"}
    assert all(p.grad is None for p in text.parameters())
    system.export(tmp_path)
    assert UNet2DConditionModel.from_pretrained(tmp_path / "unet").config.in_channels == 8


def test_text_to_image_refuses_latents_of_another_base(tmp_path):
    base = load_base(write_tiny_base(tmp_path / "base"))
    (tmp_path / "data").mkdir()
    writer = ColumnsWriter(tmp_path / "data")
    writer.write(0, {"latents": torch.zeros(1, *base.latent_shape())})
    writer.finish(1, {"base": "that one", "encoders_fingerprint": "another"})
    with pytest.raises(ImpromptError, match="prepared with that one"):
        text_to_image.build(
            text_to_image.TextToImageOptions(start="base"), base, Columns.open(tmp_path / "data")
        )


def test_the_schedule_ends_in_almost_pure_noise():
    scheduler = text_to_image.create_scheduler()
    assert scheduler.alphas_cumprod[-1] < 5e-4


def test_judge_learns_and_is_saved_whole(batch, tmp_path):
    torch.manual_seed(0)
    system = classifier.ClassifierSystem(classifier.Judge(width=8))
    first, last = steps(system, batch, count=12)
    assert last < first
    system.module.eval()
    system.export(tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors")
    pixels = batch["pixels"].float() / 127.5 - 1
    with torch.no_grad():
        for name, logits in system.module(pixels).items():
            torch.testing.assert_close(again(pixels)[name], logits, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["autoencoder", "classifier", "contrastive", "face-encoder", "map-reader", "text-to-image"],
)
def test_what_is_trained_is_where_the_base_is(name, tmp_path):
    base = load_base(write_tiny_base(tmp_path / "base"))
    fingerprint, encoders = base.fingerprint(), base.encoders_fingerprint()
    writer = ColumnsWriter(tmp_path)
    writer.write(0, {"character": torch.arange(4)})
    writer.finish(4, {"encoders_fingerprint": encoders})
    base.fingerprint, base.encoders_fingerprint = lambda: fingerprint, lambda: encoders
    base.to("meta")  # for want of a GPU: another device than data and new networks are on
    columns = Columns.open(tmp_path)
    system, _, _ = prepare_run(
        name, base, columns, None, ["train.steps=1", "train.validation_rows=0"]
    )
    assert {p.device.type for p in system.module.parameters()} == {"meta"}
