"""From pictures to features: crops, merging, and features kept in files."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_base import VISION_EMBED_DIM, VISION_HIDDEN_DIM, write_tiny_base

from imprompt.adapters import create_adapter
from imprompt.bases import ClipImageEncoder, load_base
from imprompt.core.errors import ImpromptError
from imprompt.generation import ImageFeatures, ImagePrompt, encode_images, generate
from imprompt.generation import features as features_module
from imprompt.generation.features import encoded, merge_features, pixels_of_image_like, squares

WIDE = torch.linspace(-1, 1, 25).expand(3, 10, 25)


@pytest.mark.parametrize("image", [WIDE, WIDE.transpose(1, 2)])
def test_crops_are_square_and_show_what_they_promise(image):
    along = 2 if image.shape[2] > image.shape[1] else 1
    (padded,) = squares(image, "pad")
    assert padded.shape == (3, 25, 25)
    torch.testing.assert_close(padded.narrow(3 - along, 7, 10), image)
    assert padded.narrow(3 - along, 0, 7).abs().max() == 0
    (stretched,) = squares(image, "stretch")
    assert stretched.shape == (3, 25, 25)
    tiles = squares(image, "tiles")
    assert [tuple(tile.shape) for tile in tiles] == [(3, 10, 10)] * 3
    torch.testing.assert_close(tiles[0], image.narrow(along, 0, 10))
    torch.testing.assert_close(tiles[-1], image.narrow(along, 15, 10))
    with pytest.raises(ImpromptError, match="no crop"):
        squares(image, "round")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (torch.full((3, 8, 8), 255, dtype=torch.uint8), "torch.uint8; they must be floating point"),
        (torch.full((3, 8, 8), 255.0), "from 255 to 255"),
        (torch.full((3, 8, 8), torch.nan), "from nan to nan"),
        (torch.zeros(1, 3, 8, 8), "has the shape"),
        (torch.zeros(3, 0, 8), "has the shape"),
    ],
)
def test_pixels_that_are_none_are_refused(base_adapter, pixels, said):
    with pytest.raises(ImpromptError, match=said):
        ImagePrompt(pixels, adapter=base_adapter)
    with pytest.raises(ImpromptError, match=said):
        pixels_of_image_like(pixels)


def test_pixels_may_be_of_any_precision_and_overshoot_a_little():
    pixels = torch.linspace(-1.3, 1.3, 3 * 64).view(3, 8, 8)
    for given in (pixels, pixels.half(), pixels.bfloat16(), pixels.double()):
        assert pixels_of_image_like(given) is given


def test_squares_go_through_the_encoder_together(base, pictures, monkeypatch):
    encoder, seen = base.image_encoder, []
    monkeypatch.setattr(features_module, "SQUARES_AT_ONCE", 3)
    images = [WIDE, pictures[0], WIDE.transpose(1, 2)[:, :20], pictures[1]]
    parts = [square for image in images for square in squares(pixels_of_image_like(image), "tiles")]
    assert len(parts) == 3 + 1 + 2 + 1
    hook = encoder.model.register_forward_hook(lambda *a, **k: seen.append(1))
    for name, encode in (
        ("image_embeds", encoder.embeds),
        ("hidden_states", encoder.hidden_states),
    ):
        wanted = torch.cat([encode(part[None]) for part in parts])
        seen.clear()
        found = encoded(encoder, images, name, "tiles")
        assert len(seen) == 3
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    hook.remove()


def test_merging():
    values = torch.tensor([[2.0, 0.0], [0.0, 4.0]])

    def merged(merge, weights=None):
        return merge_features(values, merge, weights).tolist()

    assert merged("concat") == [[2, 0], [0, 4]]
    assert merged("concat", [0.5, 2]) == [[1, 0], [0, 8]]
    assert merged("mean") == [[1, 2]]
    assert merged("mean", [3, 1]) == [[1.5, 1]]
    assert merged("sum", [1, 0.5]) == [[2, 2]]
    assert merged("difference") == [[2, -4]]
    assert merged("norm mean") == [[1.5, 1.5]]
    for merge, weights, message in (
        ("mix", None, "no merge"),
        ("mean", [1], "1 weights"),
        ("mean", [1, -1], "no mean"),
    ):
        with pytest.raises(ImpromptError, match=message):
            merge_features(values, merge, weights)
    with pytest.raises(ImpromptError, match="two images"):
        merge_features(values[:1], "difference", None)


def test_kept_features_draw_what_the_picture_draws(base, adapter, pictures, tmp_path):
    name = adapter.projection.features[0].name
    encode_images(base.image_encoder, pictures[:1], name).save(tmp_path / "kept.safetensors")

    def drawn(image):
        return generate(
            base, "", ImagePrompt(image, adapter=adapter), steps=2, guidance_scale=3, progress=False
        )[0].tobytes()

    wanted = drawn(pictures[0])
    assert drawn(str(tmp_path / "kept.safetensors")) == wanted
    assert drawn(ImageFeatures.load(tmp_path / "kept.safetensors")) == wanted
    assert drawn(pictures[1]) != wanted


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The same base without an image encoder."""
    folder = tmp_path_factory.mktemp("bases") / "bare"
    return load_base(write_tiny_base(folder, image_encoder=False))


@pytest.mark.parametrize("variant", ["base", "plus", "full", "instruct"])
def test_kept_features_need_no_encoder(base, bare, pictures, tmp_path, variant, monkeypatch):
    dim = VISION_EMBED_DIM if variant == "base" else VISION_HIDDEN_DIM
    adapter = create_adapter(base.unet, variant, feature_dim=dim, depth=1)
    name = adapter.projection.features[0].name
    features = encode_images(base.image_encoder, pictures[:1], name)
    features.save(tmp_path / "kept.safetensors")
    kept = ImageFeatures.load(tmp_path / "kept.safetensors")
    # As files were written before what stands for no picture was kept beside.
    replace(features, zero_values=None).save(tmp_path / "old.safetensors")
    old = str(tmp_path / "old.safetensors")

    def drawn(on, image, guidance_scale=3.0, **options):
        prompt = ImagePrompt(image, adapter=adapter)
        options = {"steps": 2, "guidance_scale": guidance_scale, "progress": False, **options}
        return generate(on, "a cat", prompt, **options)[0].tobytes()

    wanted, unguided = (drawn(base, pictures[0], guidance) for guidance in (3.0, 1.0))
    assert drawn(bare, kept) == drawn(bare, features) == wanted
    assert drawn(bare, old, image_encoder=base.image_encoder) == wanted
    assert drawn(bare, old, 1.0) == unguided
    if variant == "base":
        assert kept.zero_values is None and drawn(bare, old) == wanted
    else:
        with pytest.raises(ImpromptError, match="what stands for no picture"):
            drawn(bare, old)

    def never(_):
        raise AssertionError("asked for, though nothing is guided")

    monkeypatch.setattr(ClipImageEncoder, "zero_hidden_states", never)
    assert drawn(base, pictures[0], 1.0) == unguided


def test_a_file_of_other_tensors_is_refused(tmp_path):
    states, zero = torch.zeros(2, 5, 3), torch.zeros(1, 5, 3)
    for tensors in (
        {},
        {"zero_hidden_states": zero},
        {"hidden_states": states, "image_embeds": torch.zeros(2, 3)},
        {"hidden_states": states, "zero_hidden_states": torch.zeros(2, 5, 3)},
        {"hidden_states": states, "zero_image_embeds": zero},
    ):
        metadata = {"format": "imprompt-features", "encoder_fingerprint": "0" * 16}
        save_file(tensors, tmp_path / "kept.safetensors", metadata)
        with pytest.raises(ImpromptError, match="holds no image features"):
            ImageFeatures.load(tmp_path / "kept.safetensors")


def test_features_that_do_not_fit_are_refused(base, adapter, pictures, tmp_path):
    name = adapter.projection.features[0].name
    kept = encode_images(base.image_encoder, pictures[:1], name)

    def draw(features):
        generate(base, "", ImagePrompt(features, adapter=adapter), steps=1, progress=False)

    with pytest.raises(ImpromptError, match="another image encoder"):
        draw(ImageFeatures(name=name, values=kept.values, encoder_fingerprint="0" * 16))
    with pytest.raises(ImpromptError, match="reads"):
        draw(
            ImageFeatures(
                name=name,
                values=kept.values[..., :3],
                encoder_fingerprint=kept.encoder_fingerprint,
            )
        )
    with pytest.raises(ImpromptError, match="cannot be read"):
        ImageFeatures.load(tmp_path / "nowhere.safetensors")
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    with pytest.raises(ImpromptError, match="cannot be read"):
        ImageFeatures.load(tmp_path / "picture.png")


def test_a_difference_weighs_each_picture():
    values = torch.tensor([[4.0, 0.0], [2.0, 2.0], [0.0, 6.0]])
    merged = merge_features(values, "difference", (0.5, 1.0, 0.5))
    assert merged.tolist() == [[2.0 - 1.0, 0.0 - 2.5]]
