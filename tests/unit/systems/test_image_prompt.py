"""IP-Adapter as a system: what trains, what is dropped, what is saved."""

import pytest
import torch
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.checkpoints import load_adapter
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns
from imprompt.data.prepare import prepare
from imprompt.systems import concatenation, image_prompt
from imprompt.systems.image_prompt import ImagePromptOptions, drops
from imprompt.systems.warm_start import caption_ends, ridge_regression, states_after
from imprompt.training.config import TrainConfig
from imprompt.training.loop import train


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_tiny_base(folder, image_encoder=True)
    return folder


@pytest.fixture
def base(base_folder):
    return load_base(base_folder)


@pytest.fixture(scope="module", params=["base", "plus", "full"])
def variant_and_columns(request, base_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "data"
    prepare("diorama:12", folder, load_base(base_folder), variant=request.param)
    return request.param, Columns.open(folder)


def system_of(base, variant, columns, **options):
    return image_prompt.build(ImagePromptOptions(variant=variant, **options), base, columns)


def test_drops_come_at_the_published_rates():
    no_image, no_text = drops(Randomness(0, range(40_000)), ImagePromptOptions())
    only_image, only_text = no_image & ~no_text, no_text & ~no_image
    for share in (only_image, only_text, no_image & no_text):
        assert share.float().mean().item() == pytest.approx(0.05, abs=0.004)


def test_exactly_the_adapter_receives_gradients(base, variant_and_columns):
    variant, columns = variant_and_columns
    system = system_of(base, variant, columns)
    batch = columns.rows(range(6), system.columns)
    loss, _ = system.loss(batch, Randomness(0, range(6)))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in system.module.parameters())
    assert all(p.grad is None for part in base.parts().values() for p in part.parameters())


def test_the_loss_of_a_sample_does_not_depend_on_its_batch(base, variant_and_columns):
    variant, columns = variant_and_columns
    system = system_of(base, variant, columns)
    together, _ = system.loss(columns.rows(range(4), system.columns), Randomness(0, range(4)))
    alone = [
        system.loss(columns.rows([i], system.columns), Randomness(0, [i]))[0] for i in range(4)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_a_dropped_image_is_what_the_paper_says(base, variant_and_columns):
    variant, columns = variant_and_columns
    system = system_of(base, variant, columns, drop_image=1.0, drop_text=0.0, drop_both=0.0)
    batch = columns.rows(range(3), system.columns)
    loss, _ = system.loss(batch, Randomness(0, range(3)))
    feature = system.columns[2]
    nothing = torch.zeros(1) if variant == "base" else base.image_encoder.zero_hidden_states()
    replaced = {**batch, feature: nothing.expand_as(batch[feature]).to(batch[feature])}
    kept = system_of(base, variant, columns, drop_image=0.0, drop_text=0.0, drop_both=0.0)
    expected, _ = kept.loss(replaced, Randomness(0, range(3)))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)


def test_trained_saved_and_loaded_it_is_the_same_adapter(base, variant_and_columns, tmp_path):
    variant, columns = variant_and_columns
    system = system_of(base, variant, columns)
    config = TrainConfig(steps=3, batch_size=2, validation_rows=4, learning_rate=1e-3)
    file = train(system, columns, config, tmp_path / "run", export_name="adapter.safetensors")
    loaded = load_adapter(file)
    assert loaded.variant == variant
    for name, weight in system.module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_training_lowers_the_loss_with_the_image(base, variant_and_columns, tmp_path):
    variant, columns = variant_and_columns
    system = system_of(base, variant, columns)
    held_out = columns.rows(range(12), system.columns)
    before = system.validate(held_out, Randomness(1, range(12)))
    config = TrainConfig(steps=60, batch_size=4, validation_rows=0, learning_rate=1e-2)
    train(system, columns, config, tmp_path / "run", export_name="adapter.safetensors")
    after = system.validate(held_out, Randomness(1, range(12)))
    assert after["loss_with_image"] < before["loss_with_image"]


def test_data_of_another_base_are_refused(variant_and_columns, tmp_path):
    variant, columns = variant_and_columns
    write_tiny_base(tmp_path / "other", seed=1, image_encoder=True)
    with pytest.raises(ImpromptError, match="prepare them with this base"):
        system_of(load_base(tmp_path / "other"), variant, columns)


def test_data_of_another_variant_are_refused(base, variant_and_columns, tmp_path):
    variant, columns = variant_and_columns
    other = "plus" if variant == "base" else "base"
    system = system_of(base, other, columns)
    with pytest.raises(ImpromptError, match="lacks the column"):
        train(system, columns, TrainConfig(steps=1, validation_rows=1), tmp_path / "run")


def test_the_ablation_trains_as_many_parameters_and_leaves_the_unet_bare(base, variant_and_columns):
    variant, columns = variant_and_columns
    if variant != "base":
        pytest.skip("the ablation reads image embeddings")
    decoupled = system_of(base, "base", columns)
    system = concatenation.build(concatenation.ConcatenationOptions(), base, columns)
    sizes = [sum(p.numel() for p in s.module.parameters()) for s in (decoupled, system)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    loss, _ = system.loss(columns.rows(range(2), system.columns), Randomness(0, range(2)))
    loss.backward()
    assert all(p.grad is not None for p in system.module.parameters())


def test_fitted_to_captions_tokens_begin_as_caption_states(base, variant_and_columns):
    variant, columns = variant_and_columns
    if variant != "base":
        with pytest.raises(ImpromptError, match="base variant"):
            system_of(base, variant, columns, fit_to_captions=True)
        with pytest.raises(ImpromptError, match="lacks the column image_embeds"):
            system_of(base, "base", columns, fit_to_captions=True)
        return
    rows = columns.rows(range(len(columns)), ["image_embeds", "text_ids"])
    states = base.encode_text(rows["text_ids"]).sequence
    ends = caption_ends(rows["text_ids"], base.tokenizer.eos_token_id)
    wanted = states_after(states, ends, 4)

    def distance(**options):
        module = system_of(base, variant, columns, **options).module
        return (module.tokens(rows["image_embeds"].float()) - wanted).square().mean()

    spread = (wanted - wanted.mean((0, 1))).square().mean()
    assert distance(fit_to_captions=True) < 0.5 * spread < 0.5 * distance()


def test_states_after_the_caption_end_are_spread_over_the_padding():
    states = torch.arange(10.0)[None, :, None].expand(2, -1, -1)
    ids = torch.tensor([[1, 5, 5, 9, 9, 9, 9, 9, 9, 9], [1, 5, 5, 5, 5, 5, 5, 5, 5, 5]])
    ends = caption_ends(ids, end_id=9)
    assert ends.tolist() == [3, 9]
    assert states_after(states, ends, 4)[..., 0].tolist() == [[3, 5, 7, 9], [9, 9, 9, 9]]


def test_ridge_regression_finds_a_linear_map():
    inputs = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.arange(10.0).view(5, 2), torch.tensor([3.0, -1.0])
    found, offset = ridge_regression(inputs, inputs @ weight + bias)
    torch.testing.assert_close(found, weight, rtol=0.01, atol=0.01)
    torch.testing.assert_close(offset, bias, rtol=0.01, atol=0.01)


def test_positions_are_for_a_new_plus(base, variant_and_columns, tmp_path):
    variant, columns = variant_and_columns
    if variant != "plus":
        with pytest.raises(ImpromptError, match=f"{variant} variant has no positions"):
            system_of(base, variant, columns, positions=True)
        return
    system = system_of(base, variant, columns, positions=True)
    loss, _ = system.loss(columns.rows(range(4), system.columns), Randomness(0, range(4)))
    loss.backward()
    assert system.module.image_proj.pos_emb.weight.grad.any()
    system.export(tmp_path / "placed.safetensors")
    start = str(tmp_path / "placed.safetensors")
    assert system_of(base, variant, columns, positions=True, start_from=start)

    system_of(base, variant, columns).export(tmp_path / "plain.safetensors")
    with pytest.raises(ImpromptError, match="plain.safetensors has no positions"):
        start = str(tmp_path / "plain.safetensors")
        system_of(base, variant, columns, positions=True, start_from=start)
