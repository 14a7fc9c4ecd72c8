"""InstantID and face-id as systems: what trains, from what, and what is written."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_base import write_tiny_base

from imprompt.bases import load_base
from imprompt.checkpoints import load_adapter
from imprompt.checkpoints.identity import load_identity, reads_faces
from imprompt.core.errors import ImpromptError
from imprompt.core.randomness import Randomness
from imprompt.data.dataset import Columns, ColumnsWriter
from imprompt.encoders.face import DioramaFaceEncoder, InsightFaceEncoder
from imprompt.encoders.face_network import FaceNetwork
from imprompt.systems import face_id, identity
from imprompt.systems.likeness import Likeness
from imprompt.systems.protocol import System

COUNT, ID_DIM = 6, 12


@pytest.fixture
def base(tmp_path):
    return load_base(write_tiny_base(tmp_path / "base"))


@pytest.fixture
def columns(base, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(COUNT, *shape, generator=generator)

    (tmp_path / "data").mkdir()
    writer = ColumnsWriter(tmp_path / "data")
    latents = base.latent_shape()
    states = base.image_encoder.zero_hidden_states().shape[1:]
    writer.write(
        0,
        {
            "latent_mean": normal(*latents),
            "latent_logvar": torch.full((COUNT, *latents), -9.0),
            "id_embeds": torch.nn.functional.normalize(normal(ID_DIM), dim=1),
            "id_lengths": 20 + normal(1),
            "reference_hidden_states": normal(*states),
            "landmarks": torch.rand(COUNT, 5, 2, generator=generator),
            "text_ids": base.tokenize(["a red house"] * COUNT),
        },
    )
    meta = {"encoders_fingerprint": base.encoders_fingerprint(), "face_encoder": "abc"}
    writer.finish(COUNT, meta)
    return Columns.open(tmp_path / "data")


def trained(system, columns, steps=3):
    batch = columns.rows(range(COUNT), system.columns)
    parameters = [p for p in system.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(steps):
        loss, _ = system.loss(batch, Randomness(0, range(step * COUNT, (step + 1) * COUNT)))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
    return batch


def test_adapter_and_identity_net_train_together_and_nothing_else(base, columns):
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    options = identity.IdentityOptions(num_tokens=3, depth=1, zero_entry=False)
    system = identity.build(options, base, columns)
    assert isinstance(system, System)
    parts = {name.split(".")[0] for name, _ in system.module.named_parameters()}
    assert parts == {"adapter", "identity_net"}
    trained(system, columns)
    assert all(torch.equal(v, before[k]) for k, v in base.unet.state_dict().items())


def test_what_is_dropped_is_not_seen(base, columns):
    options = identity.IdentityOptions(num_tokens=3, depth=1, zero_entry=False, drop_all=1.0)
    system = identity.build(options, base, columns)
    batch = trained(system, columns)
    others = {
        **batch,
        "id_embeds": batch["id_embeds"].flip(0),
        "text_ids": base.tokenize(["a boat at night"] * COUNT),
    }
    moved = {**batch, "landmarks": 1 - batch["landmarks"]}
    loss, of_others, of_moved = (
        system.loss(rows, Randomness(0, range(COUNT)))[0] for rows in (batch, others, moved)
    )
    assert loss == of_others != of_moved


def test_identity_net_reads_the_face_and_the_landmarks_but_not_the_text(base, columns):
    options = identity.IdentityOptions(num_tokens=3, depth=1, zero_entry=False)
    system = identity.build(options, base, columns)
    batch = trained(system, columns)
    seen = []

    def keep(_, arguments, keywords):
        seen.append((keywords["encoder_hidden_states"], keywords["controlnet_cond"]))

    system.module.identity_net.register_forward_pre_hook(keep, with_kwargs=True)
    randomness = Randomness(0, range(COUNT))
    system.loss(batch, randomness)
    system.loss({**batch, "text_ids": base.tokenize(["in snow"] * COUNT)}, randomness)
    system.loss({**batch, "id_embeds": batch["id_embeds"].flip(0)}, randomness)
    assert seen[0][0].shape == (COUNT, 3, base.unet.config.cross_attention_dim)
    assert seen[0][1].shape == (COUNT, 3, base.image_size_px, base.image_size_px)
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.allclose(seen[0][0], seen[2][0])


def test_nothing_is_dropped(base, columns):
    """The same noise, step and posterior draw, whatever "drop" would draw: the loss is a function of them."""
    options = identity.IdentityOptions(num_tokens=3, depth=1)
    system = identity.build(options, base, columns)
    zeros = []
    tokens = system.module.adapter.image_proj.register_forward_pre_hook(
        lambda _, given: zeros.append((given[0] == 0).all(dim=(1, 2)).any().item())
    )
    for start in range(0, 60, COUNT):
        batch = columns.rows(range(COUNT), system.columns)
        system.loss(batch, Randomness(0, range(start, start + COUNT)))
    tokens.remove()
    assert len(zeros) == 10 and not any(zeros)


def test_validation_tells_what_each_part_is_worth(base, columns):
    options = identity.IdentityOptions(num_tokens=3, depth=1)
    system = identity.build(options, base, columns)
    batch = columns.rows(range(COUNT), system.columns)
    figures = system.validate(batch, Randomness(1, range(COUNT)))
    # A new IdentityNet adds nothing yet.
    assert figures["loss"] == pytest.approx(figures["loss_without_identity_net"], rel=1e-5)
    assert figures["loss_without_adapter"] == pytest.approx(figures["loss_with_text"], rel=1e-5)
    assert figures["loss"] != pytest.approx(figures["loss_with_text"], rel=1e-5)


def test_what_is_exported_is_read_again_and_gone_on_with(base, columns, tmp_path):
    options = identity.IdentityOptions(num_tokens=3, depth=1, zero_entry=False)
    system = identity.build(options, base, columns)
    trained(system, columns)
    system.export(tmp_path / "out")
    loaded = load_identity(tmp_path / "out")
    assert reads_faces(loaded.adapter) and loaded.adapter.metadata["face_encoder"] == "abc"
    for mine, other in (
        (system.module.adapter, loaded.adapter),
        (system.module.identity_net, loaded.net),
    ):
        for key, value in mine.state_dict().items():
            torch.testing.assert_close(other.state_dict()[key], value, atol=2e-3, rtol=2e-3)
    again = identity.build(
        identity.IdentityOptions(start_from=str(tmp_path / "out")), base, columns
    )
    assert all(p.requires_grad for p in again.module.parameters())
    trained(again, columns, steps=1)
    again.adapter.metadata["base_fingerprint"] = "of the base where it began"
    again.export(tmp_path / "again")
    told = json.loads((tmp_path / "again" / "identity.json").read_text())
    assert (told["base_fingerprint"], told["face_encoder"]) == (base.fingerprint(), "abc")


def test_vectors_are_read_as_the_face_encoder_gives_them_unless_asked_otherwise(
    base, columns, tmp_path
):
    small = {"num_tokens": 3, "depth": 1}
    raw = identity.build(identity.IdentityOptions(**small), base, columns)
    unit = identity.build(identity.IdentityOptions(**small, raw_faces=False), base, columns)
    for system, length in ((raw, 20.0), (unit, 1.0)):
        batch = columns.rows(range(COUNT), system.columns)
        faces = system.faces(batch)
        assert faces.shape == (COUNT, 1, ID_DIM)
        assert faces.norm(dim=2).mean().item() == pytest.approx(length, rel=0.1)
        trained(system, columns, steps=1)
        out = tmp_path / str(length)
        system.export(out)
        assert reads_faces(load_identity(out).adapter)
        again = identity.build(identity.IdentityOptions(start_from=str(out)), base, columns)
        torch.testing.assert_close(again.faces(batch), faces)
    with pytest.raises(ImpromptError, match="of length 1, and raw_faces is true: leave it out"):
        options = identity.IdentityOptions(start_from=str(out), raw_faces=True)
        identity.build(options, base, columns)


def test_another_face_encoders_vectors_are_refused(base, columns, tmp_path):
    identity.build(identity.IdentityOptions(num_tokens=3, depth=1), base, columns).export(
        tmp_path / "person"
    )
    options = face_id.FaceIdOptions(lora_rank=2, num_tokens=2)
    face_id.build(options, base, columns).export(tmp_path / "face.safetensors")
    columns.meta["face_encoder"] = "def"
    with pytest.raises(ImpromptError, match=r"person knows persons by another face encoder \(abc"):
        identity.build(identity.IdentityOptions(start_from=str(tmp_path / "person")), base, columns)
    options = face_id.FaceIdOptions(start_from=str(tmp_path / "face.safetensors"))
    with pytest.raises(ImpromptError, match=r"face.safetensors knows persons by another"):
        face_id.build(options, base, columns)


def test_published_files_know_persons_by_insightface(base, columns, tmp_path):
    """They do not say so; each variant was trained with one model of that library."""
    options = face_id.FaceIdOptions(lora_rank=2, num_tokens=2)
    state = face_id.build(options, base, columns).module.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "published.safetensors")
    options = face_id.FaceIdOptions(start_from=str(tmp_path / "published.safetensors"))
    for pack, fits in (("buffalo_l", True), ("antelopev2", False)):
        columns.meta["face_encoder"] = InsightFaceEncoder(pack, analysis=object()).fingerprint()
        if fits:
            face_id.build(options, base, columns)
        else:
            with pytest.raises(ImpromptError, match=r"\(insightface:buffalo_l\).*:antelopev2"):
                face_id.build(options, base, columns)


def test_face_id_goes_on_in_the_generation_that_it_began_in(base, columns, tmp_path):
    def build(**given):
        options = face_id.FaceIdOptions(variant="faceid-plus", lora_rank=2, num_tokens=2, **given)
        return face_id.build(options, base, columns)

    second, first = str(tmp_path / "second.safetensors"), str(tmp_path / "first.safetensors")
    build(shortcut=True).export(tmp_path / "second.safetensors")
    build().export(tmp_path / "first.safetensors")
    assert build(start_from=second).module.image_proj.shortcut
    assert build(start_from=second, shortcut=True).module.image_proj.shortcut
    assert not build(start_from=first).module.image_proj.shortcut
    with pytest.raises(ImpromptError, match="second generation, which shortcut=false is not"):
        build(start_from=second, shortcut=False)
    with pytest.raises(ImpromptError, match="faceid has no shortcut"):
        face_id.build(face_id.FaceIdOptions(shortcut=True), base, columns)


def test_a_published_folder_is_read(base, columns, tmp_path):
    """As the authors publish it: ip-adapter.bin of two dicts, ControlNetModel/ beside it."""
    options = identity.IdentityOptions(num_tokens=3, depth=1)
    system = identity.build(options, base, columns)
    system.export(tmp_path / "out")
    state = system.module.adapter.state_dict()
    two_dicts = {
        part: {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(part)}
        for part in ("image_proj", "ip_adapter")
    }
    (tmp_path / "out/ip-adapter.safetensors").unlink()
    torch.save(two_dicts, tmp_path / "out/ip-adapter.bin")
    with pytest.raises(ImpromptError, match="reads no faces"):  # for it reads 12 numbers, not 512
        load_identity(tmp_path / "out")


def test_a_lora_is_learnt_beside(base, columns, tmp_path):
    """New with the adapter, or later; and read again with the folder, with no need to say so."""
    small = {"num_tokens": 3, "depth": 1, "zero_entry": False}
    plain = identity.build(identity.IdentityOptions(**small), base, columns)
    trained(plain, columns, steps=1)
    plain.export(tmp_path / "plain")
    up = "ip_adapter.0.to_q_lora.up.weight"
    for options in (
        identity.IdentityOptions(**small, lora_rank=2),
        identity.IdentityOptions(start_from=str(tmp_path / "plain"), lora_rank=2),
    ):
        system = identity.build(options, base, columns)
        assert not system.adapter.state_dict()[up].any()
        trained(system, columns)
        assert system.adapter.state_dict()[up].any()
    system.export(tmp_path / "with")
    assert load_identity(tmp_path / "with").adapter.lora_rank == 2
    options = identity.IdentityOptions(start_from=str(tmp_path / "with"))
    again = identity.build(options, base, columns)
    assert again.adapter.lora_rank == 2 and again.adapter.state_dict()[up].any()
    with pytest.raises(ImpromptError, match="has a LoRA, of rank 2"):
        identity.build(
            identity.IdentityOptions(start_from=str(tmp_path / "with"), lora_rank=4), base, columns
        )


@pytest.fixture
def faces():
    torch.manual_seed(0)
    return DioramaFaceEncoder(FaceNetwork(width=4, embed_dim=ID_DIM))


@pytest.fixture
def likeness(base, faces):
    return Likeness(base, lambda pixels: faces.read(pixels)[0])


def test_likeness_is_a_loss_that_can_be_learnt(base, faces, likeness):
    """By steps on the latents alone one picture's person comes to look as the other's."""
    generator = torch.Generator().manual_seed(0)
    wanted, latents = torch.randn(2, 2, *base.latent_shape(), generator=generator)
    pixels = base.decode_image(wanted)
    id_embeds = faces.embeds(pixels)
    assert likeness.distance(wanted, 7 * id_embeds).abs().max() < 1e-5
    latents.requires_grad_(True)
    optimizer = torch.optim.Adam([latents], lr=0.05)
    distances = []
    for _ in range(25):
        distance = likeness.distance(latents, id_embeds)
        optimizer.zero_grad()
        distance.sum().backward()
        optimizer.step()
        distances.append(distance.detach())
    assert (distances[-1] < 0.5 * distances[0]).all()
    assert all(p.grad is None for p in faces.network.parameters())


def test_likeness_counts_where_somebody_is_to_be_seen(base, columns, likeness):
    def losses(batch, weight=1.0, drop_all=0.0, sizes=(COUNT,)):
        options = identity.IdentityOptions(num_tokens=3, depth=1, drop_all=drop_all)
        system = identity.build(options, base, columns)
        likeness.weight = weight
        system = identity.IdentitySystem(
            base, system.adapter, system.net, drop_all=drop_all, likeness=likeness
        )
        found, start = [], 0
        for size in sizes:
            rows = {name: values[start : start + size] for name, values in batch.items()}
            loss, figures = system.loss(rows, Randomness(0, range(start, start + size)))
            found.append(size * torch.stack([loss.detach(), *figures.values()]))
            start += size
        return torch.stack(found).sum(0) / COUNT

    batch = columns.rows(range(COUNT), (*identity.IdentitySystem.columns, "id_lengths"))
    loss, of_noise, of_likeness = losses(batch)
    assert of_likeness > 0
    assert loss == pytest.approx((of_noise + of_likeness).item())
    assert losses(batch, weight=0.5)[0] == pytest.approx((of_noise + 0.5 * of_likeness).item())
    assert losses(batch, drop_all=1.0)[2] == 0
    # As many parts as one likes: each row counts for itself.
    torch.testing.assert_close(
        losses(batch, sizes=(1, 2, 3)), torch.stack([loss, of_noise, of_likeness])
    )


def test_likeness_needs_an_encoder_that_gradients_pass_through(base, columns):
    with pytest.raises(ImpromptError, match=r"No gradients pass .* system.likeness=0"):
        identity.build(identity.IdentityOptions(likeness=0.1), base, columns)


def test_what_is_missing_is_told(base, columns, tmp_path):
    with pytest.raises(ImpromptError, match="holds no identity adapter"):
        load_identity(tmp_path)
    system = identity.build(identity.IdentityOptions(num_tokens=3, depth=1), base, columns)
    system.export(tmp_path / "out")
    (tmp_path / "out/ControlNetModel/config.json").unlink()
    with pytest.raises(ImpromptError, match="holds no IdentityNet"):
        load_identity(tmp_path / "out")


@pytest.mark.parametrize(("variant", "shortcut"), [("faceid", False), ("faceid-plus", True)])
def test_face_id_trains_with_its_lora(base, columns, tmp_path, variant, shortcut):
    options = face_id.FaceIdOptions(variant=variant, lora_rank=2, shortcut=shortcut, num_tokens=2)
    system = face_id.build(options, base, columns)
    up = "ip_adapter.0.to_q_lora.up.weight"
    assert not system.module.state_dict()[up].any()
    trained(system, columns)
    assert system.module.state_dict()[up].any()
    system.export(tmp_path / "face.safetensors")
    loaded = load_adapter(tmp_path / "face.safetensors")
    assert loaded.variant == variant and loaded.lora_rank == 2 and reads_faces(loaded)
    assert loaded.metadata["face_encoder"] == "abc"
    if shortcut:
        assert loaded.image_proj.shortcut
    for key, value in system.module.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_face_id_drops_by_zero_identity(base, columns):
    options = face_id.FaceIdOptions(lora_rank=2, drop_image=1.0, drop_text=0.0, drop_both=0.0)
    system = face_id.build(options, base, columns)
    batch = columns.rows(range(COUNT), system.columns)
    randomness = Randomness(0, range(COUNT))
    loss, _ = system.loss(batch, randomness)
    other, _ = system.loss({**batch, "id_embeds": -batch["id_embeds"]}, randomness)
    assert loss.item() == other.item()


def test_mistakes_are_told(base, columns):
    with pytest.raises(ImpromptError, match="reads no faces"):
        face_id.build(face_id.FaceIdOptions(variant="plus"), base, columns)
    with pytest.raises(ImpromptError, match="lora_rank"):
        face_id.build(face_id.FaceIdOptions(lora_rank=0), base, columns)
    with pytest.raises(ImpromptError, match="fit_to_captions"):
        face_id.build(face_id.FaceIdOptions(fit_to_captions=True), base, columns)


def test_an_identity_folder_describes_itself(base, columns, tmp_path):
    system = identity.build(identity.IdentityOptions(num_tokens=3, depth=1), base, columns)
    system.export(tmp_path / "out")
    described = json.loads((tmp_path / "out/identity.json").read_text())
    assert described["base_fingerprint"] == base.fingerprint()
    assert described["kind"] == "identity"
