"""Persons in generation: face adapters as image prompts, and identities with their IdentityNet."""

import json

import numpy as np
import pytest
import torch
from diffusers.models import modeling_utils
from safetensors.torch import save_file
from tiny_base import VISION_HIDDEN_DIM, vision_config
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from imprompt.adapters import create_adapter
from imprompt.bases import ClipImageEncoder, load_base
from imprompt.checkpoints.identity import Identity
from imprompt.core.errors import ImpromptError
from imprompt.encoders import face
from imprompt.encoders.face import DioramaFaceEncoder, InsightFaceEncoder, load_face_encoder
from imprompt.encoders.face_network import FaceNetwork
from imprompt.encoders.landmarks import landmark_images
from imprompt.generation import IdentityPrompt, ImagePrompt, generate
from imprompt.generation.faces import face_encoder_of, face_features, face_features_of_nothing
from imprompt.generation.identity import read_person
from imprompt.generation.prompts import token_prompt
from imprompt.systems.controlnet import create_controlnet

ID_DIM = 8
FAST = {"steps": 2, "progress": False, "seed": 3}


@pytest.fixture(scope="module")
def faces():
    torch.manual_seed(0)
    return DioramaFaceEncoder(FaceNetwork(width=4, embed_dim=ID_DIM), "tiny")


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 40, 40, generator=generator) * 2 - 1 for _ in range(2)]


def shaken(module):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture
def identity(base):
    adapter = shaken(create_adapter(base.unet, "plus", feature_dim=ID_DIM, num_tokens=2, depth=1))
    adapter.metadata["reads"] = "id_embeds"
    return Identity(adapter, shaken(create_controlnet(base)).eval())


def same(first, second):
    return all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("variant", ["faceid", "faceid-plus"])
def test_a_face_is_an_image_prompt(base, faces, pictures, variant):
    feature_dim = ID_DIM if variant == "faceid" else base.image_encoder.hidden_dim
    adapter = shaken(
        create_adapter(base.unet, variant, feature_dim=feature_dim, id_dim=ID_DIM, lora_rank=2)
    )
    prompts = [ImagePrompt(one, adapter=adapter, face_encoder=faces) for one in pictures]
    first, second = (generate(base, "a house", prompt, **FAST) for prompt in prompts)
    assert not same(first, second)
    assert not same(first, generate(base, "a house", **FAST))
    assert same(first, generate(base, "a house", prompts[0], **FAST))
    both = ImagePrompt(pictures, adapter=adapter, face_encoder=faces)
    assert not same(first, generate(base, "a house", both, **FAST))


def test_the_lora_of_a_face_has_a_weight_of_its_own(base, faces, pictures):
    adapter = shaken(create_adapter(base.unet, "faceid", feature_dim=ID_DIM, lora_rank=2))

    def drawn(**options):
        prompt = ImagePrompt(pictures[0], adapter=adapter, face_encoder=faces, **options)
        return generate(base, "a house", prompt, **FAST)

    bare, silent = generate(base, "a house", **FAST), drawn(scale=0.0)
    with adapter.install(base.unet) as handle:
        tokens = adapter.tokens(*face_features(adapter, pictures[:1], faces, None))
        with handle.prompt(tokens, scale=0.0):
            assert same(silent, generate(base, "a house", **FAST))
    assert not same(silent, bare)
    assert same(silent, drawn(over_time=(0.0,)))
    assert not same(silent, drawn(scale=0.0, lora_scale=0.4))
    assert not same(drawn(), drawn(lora_scale=0.0))
    for nothing in ({"scale": 0.0, "lora_scale": 0.0}, {"scale": 0.0, "start": 0.5, "end": 0.5}):
        assert same(drawn(**nothing), bare)


def test_the_shortcut_of_a_face_has_a_weight(base, faces, pictures):
    encoder = base.image_encoder
    adapter = shaken(
        create_adapter(
            base.unet, "faceid-plus", feature_dim=encoder.hidden_dim, id_dim=ID_DIM, lora_rank=2
        )
    )
    with pytest.raises(ImpromptError, match="no shortcut"):
        ImagePrompt(pictures[0], adapter=adapter, shortcut_scale=0.5)
    adapter.image_proj.shortcut = True
    prompt = ImagePrompt(
        pictures[0], adapter=adapter, face_encoder=faces, shortcut_scale=0.5, lora_scale=0.7
    )
    with adapter.install(base.unet) as handle:
        made = token_prompt(prompt, handle, encoder)
    features = face_features(adapter, pictures[:1], faces, encoder)
    nothing = face_features_of_nothing(adapter, encoder)
    assert torch.equal(made.tokens, adapter.tokens(*features, shortcut_scale=0.5))
    assert torch.equal(made.zero_tokens, adapter.tokens(*nothing, shortcut_scale=0.5))
    assert made.lora_scale == 0.7
    assert not torch.allclose(made.tokens, adapter.tokens(*features))


def test_what_has_no_lora_is_not_weighed(pictures, identity):
    with pytest.raises(ImpromptError, match="brings no LoRA"):
        ImagePrompt(pictures[0], adapter=identity.adapter, lora_scale=0.5)


def test_what_face_adapters_read(base, faces, pictures, identity):
    pixels = torch.stack(pictures)
    plain = create_adapter(base.unet, "faceid", feature_dim=ID_DIM, lora_rank=2)
    (embeds,) = face_features(plain, pictures, faces, None)
    torch.testing.assert_close(embeds, faces.embeds(pixels))
    (sequence,) = face_features(identity.adapter, pictures, faces, None)
    torch.testing.assert_close(sequence, faces.embeds(pixels)[:, None])
    del identity.adapter.metadata["reads"]  # as the published file
    (as_they_come,) = face_features(identity.adapter, pictures, faces, None)
    torch.testing.assert_close(as_they_come[:, 0], faces.embeds(pixels, normalized=False))
    dim = base.image_encoder.hidden_dim
    plus = create_adapter(base.unet, "faceid-plus", feature_dim=dim, id_dim=ID_DIM, lora_rank=2)
    embeds, states = face_features(plus, pictures, faces, base.image_encoder)
    torch.testing.assert_close(states, base.image_encoder.hidden_states(pixels))
    with pytest.raises(ImpromptError, match="image_encoder=load_clip"):
        face_features(plus, pictures, faces, None)


def test_an_identity_acts_by_its_adapter_and_by_its_net(base, faces, pictures, identity):
    def drawn(**options):
        prompt = IdentityPrompt(pictures[0], identity, face_encoder=faces, **options)
        return generate(base, "a house", identities=[prompt], **FAST)

    bare = generate(base, "a house", **FAST)
    whole, no_net, no_adapter = drawn(), drawn(net_weight=0), drawn(scale=0.0)
    assert same(bare, drawn(scale=0.0, net_weight=0))
    for first, second in ((whole, no_net), (whole, no_adapter), (no_net, bare), (no_adapter, bare)):
        assert not same(first, second)
    options = {"adapter": identity.adapter, "face_encoder": faces, "scale": identity.weight}
    alone = ImagePrompt(pictures[0], **options)
    assert same(no_net, generate(base, "a house", alone, **FAST))
    assert same(whole, drawn())
    assert all(
        type(p).__module__.startswith("diffusers") for p in base.unet.attn_processors.values()
    )


def test_weights_are_those_that_an_identity_is_used_with_best(pictures, identity):
    """As the authors' examples for what they published; of another, or as asked for, 1."""
    metadata = identity.adapter.metadata
    for face_encoder, weight in (("", 0.8), ("of this training", 1.0)):
        person = IdentityPrompt(pictures[0], identity)
        metadata["face_encoder"] = face_encoder
        assert (person.used_scale, person.used_net_weight) == (weight, weight)
        asked = IdentityPrompt(pictures[0], identity, scale=0.5, net_weight=0)
        assert (asked.used_scale, asked.is_in_the_net) == (0.5, False)
    del metadata["face_encoder"]


def test_masks_keep_persons_apart(base, faces, pictures, identity):
    """Where one acts, the other does not: moving a person who acts nowhere changes nothing."""
    left = torch.zeros(32, 32)
    left[:, :16] = 1

    def drawn(*persons):
        prompts = [
            IdentityPrompt(picture, identity, face_encoder=faces, mask=mask)
            for picture, mask in persons
        ]
        return generate(base, "a house", identities=prompts, **FAST)

    a, b = pictures
    bare, everywhere = generate(base, "a house", **FAST), drawn((a, None))
    assert same(bare, drawn((a, torch.zeros(32, 32))))
    assert same(everywhere, drawn((a, torch.ones(32, 32))))
    both = drawn((a, left), (b, 1 - left))
    assert not same(both, drawn((b, left), (a, 1 - left)))
    assert not same(both, everywhere)
    assert same(both, drawn((b, 1 - left), (a, left)))
    with pytest.raises(ImpromptError, match="aspect ratio"):
        drawn((a, left[:, :8]))


def test_half_precision_is_no_matter_for_remarks(folder, faces, pictures, identity, monkeypatch):
    remarks = []
    monkeypatch.setattr(modeling_utils.logger, "warning", lambda *told: remarks.append(told))
    base = load_base(folder, dtype=torch.bfloat16)
    person = IdentityPrompt(pictures[0], identity, face_encoder=faces)
    generate(base, "a cat", identities=person, **FAST)
    assert next(identity.net.parameters()).dtype == torch.bfloat16 and not remarks


def test_identity_net_reads_face_and_landmarks_not_the_text(
    base, faces, pictures, identity, tmp_path
):
    places = torch.rand(1, 5, 2)
    (tmp_path / "pose.json").write_text(json.dumps(places[0].tolist()))
    seen = []
    hook = identity.net.register_forward_pre_hook(
        lambda _, __, given: seen.append(given), with_kwargs=True
    )
    for text in ("a house", "a red boat"):
        for landmarks in (places, str(tmp_path / "pose.json")):
            prompt = IdentityPrompt(pictures[0], identity, landmarks=landmarks, face_encoder=faces)
            generate(base, text, identities=[prompt], **FAST)
    hook.remove()
    assert len(seen) == 8
    tokens = seen[0]["encoder_hidden_states"]
    # The unconditional half reads the tokens of no face.
    zero = identity.adapter.tokens(torch.zeros(1, 1, ID_DIM))
    torch.testing.assert_close(tokens[:1], zero)
    assert not torch.allclose(tokens[1:], zero)
    for given in seen:
        assert torch.equal(given["encoder_hidden_states"], tokens)
        torch.testing.assert_close(
            given["controlnet_cond"], seen[0]["controlnet_cond"], atol=1e-3, rtol=0
        )


def test_identities_stand_beside_image_prompts(base, faces, pictures, identity):
    style = create_adapter(base.unet, feature_dim=base.image_encoder.embed_dim)
    person = IdentityPrompt(pictures[0], identity, face_encoder=faces)
    image = ImagePrompt(pictures[1], adapter=style)
    both = generate(base, "a house", image, identities=[person], **FAST)
    assert not same(both, generate(base, "a house", image, **FAST))
    assert not same(both, generate(base, "a house", identities=[person], **FAST))


def test_a_face_is_read_once_and_by_the_encoder_that_is_given(base, faces, pictures, identity):
    """An adapter that reads hidden states too, on a base whose own image encoder is another."""
    encoder = ClipImageEncoder(
        CLIPVisionModelWithProjection(
            CLIPVisionConfig(**{**vision_config(), "hidden_size": 2 * VISION_HIDDEN_DIM})
        )
    )
    adapter = create_adapter(
        base.unet, "faceid-plus", feature_dim=encoder.hidden_dim, id_dim=ID_DIM, lora_rank=2
    )
    counted = Counted(faces)
    person = IdentityPrompt(pictures[0], Identity(adapter, identity.net), face_encoder=counted)
    generate(base, "a house", identities=person, image_encoder=encoder, **FAST)
    assert counted.num_read == 1 and not counted.was_gradient_possible
    with pytest.raises(ImpromptError, match="image_encoder=load_clip"):
        generate(base, "a house", identities=person, **FAST)


class Counted(DioramaFaceEncoder):
    def __init__(self, faces):
        super().__init__(faces.network, "counted")
        self.num_read, self.was_gradient_possible = 0, False

    def embeds(self, *args, **kwargs):
        self.num_read += 1
        self.was_gradient_possible |= not torch.is_inference_mode_enabled()
        return super().embeds(*args, **kwargs)


def test_the_encoder_is_the_one_that_an_adapter_was_trained_with(base, faces, tmp_path):
    adapter = create_adapter(base.unet, "faceid", feature_dim=ID_DIM, lora_rank=2)
    adapter.metadata["face_encoder"] = faces.fingerprint()
    path = tmp_path / "tiny.safetensors"
    save_file({k: v.contiguous() for k, v in faces.network.state_dict().items()}, path)
    assert face_encoder_of(adapter, str(path)).fingerprint() == faces.fingerprint()
    assert load_face_encoder(path).embed_dim == ID_DIM
    adapter.metadata["face_encoder"] = "another"
    with pytest.raises(ImpromptError, match="another face encoder"):
        face_encoder_of(adapter, faces)
    with pytest.raises(ImpromptError, match=r"another face encoder.*--face-encoder"):
        face_encoder_of(adapter)


@pytest.fixture
def built(monkeypatch):
    """Names of insightface's models that were built; what is built reads nothing."""
    names = []
    monkeypatch.setattr(face, "_face_analysis", lambda pack: names.append(pack) or object())
    face._loaded.cache_clear()
    yield names
    face._loaded.cache_clear()


@pytest.mark.parametrize("trained_with", ["antelopev2", "buffalo_l", "buffalo_m"])
@pytest.mark.parametrize("variant", ["faceid", "plus"])
def test_the_model_of_insightface_is_found_again(base, built, variant, trained_with):
    options = {"lora_rank": 2} if variant == "faceid" else {"num_tokens": 2, "depth": 1}
    adapter = create_adapter(base.unet, variant, feature_dim=512, **options)
    adapter.metadata["face_encoder"] = InsightFaceEncoder(trained_with, object()).fingerprint()
    encoder = face_encoder_of(adapter)
    assert encoder.name == f"insightface:{trained_with}"
    assert face_encoder_of(adapter, encoder.name) is encoder
    assert built == [trained_with]
    # One that does not tell is taken for a published one of its kind.
    del adapter.metadata["face_encoder"]
    published = {"faceid": "insightface:buffalo_l", "plus": "insightface:antelopev2"}
    assert face_encoder_of(adapter).name == published[variant]
    # But one published file of InstantID's kind was not trained with InstantID's face encoder.
    adapter.metadata["published"] = "ip-adapter-faceid-portrait_sdxl_unnorm"
    assert face_encoder_of(adapter).name == "insightface:buffalo_l"


class Portrayed(DioramaFaceEncoder):
    """Finds every face at the same fractions of a picture."""

    places = torch.tensor([[0.4, 0.45], [0.6, 0.45], [0.5, 0.5], [0.42, 0.6], [0.58, 0.6]])[None]

    def landmarks(self, pixels):
        return self.places


def test_a_face_of_a_picture_of_another_shape_is_not_stretched(base, faces, identity):
    encoder = Portrayed(faces.network, "portrayed")
    portrait = torch.zeros(3, 60, 40)

    def maps(landmarks, size_px):
        person = IdentityPrompt(
            portrait, identity, landmarks=landmarks, scale=0.0, face_encoder=encoder
        )
        return read_person(person, base, None, None, size_px).control.maps

    square, tall = (128, 128), (192, 128)
    seen = encoder.places.clone()
    seen[..., 1] = (seen[..., 1] * 60 - 10) / 40  # the middle 40 of 60 rows
    near = {"atol": 1e-3, "rtol": 0}
    torch.testing.assert_close(maps(None, square), landmark_images(seen, *square), **near)
    torch.testing.assert_close(maps(None, tall), landmark_images(encoder.places, *tall), **near)
    # What is given stays.
    assert torch.equal(maps(encoder.places, square), landmark_images(encoder.places, *square))


def test_mistakes_are_told(faces, pictures, identity):
    with pytest.raises(ImpromptError, match="landmarks have shape"):
        IdentityPrompt(pictures[0], identity, landmarks=torch.rand(5, 2))
    for places, reason in ((torch.full((1, 5, 2), 300.0), "pixels"), (torch.nan, "finite")):
        with pytest.raises(ImpromptError, match=reason):
            IdentityPrompt(pictures[0], identity, landmarks=places * torch.ones(1, 5, 2))
    with pytest.raises(ImpromptError, match="time span"):
        IdentityPrompt(pictures[0], identity, start=0.8, end=0.2)
