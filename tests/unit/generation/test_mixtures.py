"""Image prompts, instructed ones, persons and controls in one generation: each of them is heard."""

from itertools import combinations

import pytest
import torch
from PIL import Image

from imprompt.adapters import create_adapter
from imprompt.bases import load_base
from imprompt.checkpoints.identity import Identity
from imprompt.cli.main import main
from imprompt.core.images import pixels_to_images
from imprompt.diorama import draw_maps, gallery, portrait, render, sample_scene
from imprompt.encoders.face import DioramaFaceEncoder
from imprompt.encoders.face_network import FaceNetwork
from imprompt.generation import Control, IdentityPrompt, ImagePrompt, generate, pipeline
from imprompt.systems.controlnet import create_controlnet
from imprompt.systems.t2i_adapter import create_t2i_adapter

PARTS = ("image prompt", "Instruct prompt", "identity", "ControlNet", "T2I-Adapter")
MIXTURES = [*combinations(PARTS, 2), PARTS]
TEXTS = ["a red house", "a boat"]
ID_DIM = 8
JOINT = {"guidance_scale": 3.0}
APART = {**JOINT, "image_guidance_scale": 2.0}
VISIBLE = 1e-3  # of a channel's range in [-1, 1]


@pytest.fixture(scope="module")
def base(folder):
    return load_base(folder)


@pytest.fixture(scope="module")
def parts(base):
    """What `generate` takes for each part, at a weight of it."""
    noise = torch.Generator().manual_seed(0)

    def shaken(module):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
        return module.eval()

    encoder = base.image_encoder
    resampled = {"num_tokens": 2, "resampler_dim": 64, "depth": 1}
    plain = shaken(create_adapter(base.unet, feature_dim=encoder.embed_dim))
    instructed = shaken(
        create_adapter(base.unet, "instruct", feature_dim=encoder.hidden_dim, **resampled)
    )
    kept = shaken(create_adapter(base.unet, "plus", feature_dim=ID_DIM, **resampled))
    kept.metadata["reads"] = "id_embeds"
    identity = Identity(kept, shaken(create_controlnet(base)))
    faces = DioramaFaceEncoder(shaken(FaceNetwork(width=4, embed_dim=ID_DIM)), "tiny")
    networks = {
        "ControlNet": shaken(create_controlnet(base)),
        "T2I-Adapter": shaken(create_t2i_adapter(base)),
    }
    pictures = torch.rand(5, 3, 32, 32, generator=noise) * 2 - 1

    def image_prompt(weight):
        return "image_prompts", ImagePrompt(pictures[0], adapter=plain, scale=weight)

    def instruct_prompt(weight):
        return "image_prompts", ImagePrompt(
            pictures[1], adapter=instructed, instruction="use the style", scale=weight
        )

    def person(weight):
        return "identities", IdentityPrompt(
            pictures[2], identity, scale=weight, net_weight=weight, face_encoder=faces
        )

    def control(name, picture):
        return lambda weight: (
            "controls",
            Control(image=picture, model=networks[name], weight=weight),
        )

    return {
        "image prompt": image_prompt,
        "Instruct prompt": instruct_prompt,
        "identity": person,
        "ControlNet": control("ControlNet", pictures[3]),
        "T2I-Adapter": control("T2I-Adapter", pictures[4]),
    }


@pytest.fixture
def drawn(base, parts, monkeypatch):
    """Pixels of a mixture, before they are rounded, and of how many branches each step was."""
    decoded, rows = [], []

    def keep(pixels):
        decoded.append(pixels)
        return pixels_to_images(pixels)

    monkeypatch.setattr(pipeline, "pixels_to_images", keep)

    def draw(weights, **guidance):
        given = {"image_prompts": [], "identities": [], "controls": []}
        for name, weight in weights.items():
            kind, prompt = parts[name](weight)
            given[kind].append(prompt)
        hook = base.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        try:
            generate(base, TEXTS, steps=2, seed=1, progress=False, **given, **guidance)
        finally:
            hook.remove()
        assert len(decoded[-1]) == len(TEXTS) and decoded[-1].isfinite().all()
        return decoded[-1], rows[-1] // len(TEXTS)

    return draw


@pytest.mark.parametrize("guidance", [JOINT, APART], ids=["joint", "apart"])
@pytest.mark.parametrize("names", MIXTURES, ids=" and ".join)
def test_each_part_of_a_mixture_changes_the_picture(drawn, names, guidance):
    has_prompts = any(name in names for name in PARTS[:3])
    if guidance is APART and "Instruct prompt" in names:
        guidance = {**APART, "instruction_guidance_scale": 4.0}
    expected = 2 if guidance is JOINT or not has_prompts else 4 if len(guidance) == 3 else 3
    whole, num_branches = drawn(dict.fromkeys(names, 1.0), **guidance)
    assert num_branches == expected
    for name in names:
        silent, _ = drawn({**dict.fromkeys(names, 1.0), name: 0.0}, **guidance)
        assert (whole - silent).abs().max() > VISIBLE, name


def test_without_a_weight_a_part_is_as_if_it_were_not_there(drawn):
    for name in PARTS:
        others = {other: 1.0 for other in PARTS if other != name}
        silent, _ = drawn({**others, name: 0.0}, **JOINT)
        absent, _ = drawn(others, **JOINT)
        torch.testing.assert_close(silent, absent)


def test_all_parts_at_once_on_the_command_line(tmp_path):
    scene = render([sample_scene(5)])
    person = render([portrait(6, gallery()[0], style="clay")])
    drawings = {
        "art": scene.pixels,
        "map": draw_maps(scene, "depth") * 2 - 1,
        "face": person.pixels,
    }
    for name, pixels in drawings.items():
        pixels_to_images(pixels)[0].save(tmp_path / f"{name}.png")
    given = {
        "identity": ["--identity", tmp_path / "face.png", "--identity-scale", "0.9"],
        "control": ["--control", f"depth={tmp_path / 'map.png'}:0.8"],
        "image": ["--image", tmp_path / "art.png", "--instruction", "use the style"],
    }

    def generated(names, *more):
        file = tmp_path / f"{'-'.join(names)}-{len(more)}.png"
        command = ["generate", "a person in the snow", "--steps", "2", "--num-images", "2"]
        for name in names:
            command += given[name]
        assert main([str(word) for word in (*command, *more, "--output", file)]) == 0
        with Image.open(file) as picture:
            assert picture.size == (128, 64)
            return picture.tobytes()

    whole = generated(given)
    apart = generated(given, "--image-guidance-scale", "2", "--instruction-guidance-scale", "4")
    assert whole != apart
    for name in given:
        assert generated([other for other in given if other != name]) != whole
