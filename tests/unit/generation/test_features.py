"""From pictures to features: crops, merging, and features kept in files."""

import pytest
import torch
from PIL import Image

from imprompt.core.errors import ImpromptError
from imprompt.generation import ImageFeatures, ImagePrompt, encode_images, generate
from imprompt.generation.features import merge_features, squares

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
