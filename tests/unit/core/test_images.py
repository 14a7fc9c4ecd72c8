"""Every kind of image file people have either opens as a person sees it, or is refused in one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from imprompt.core import images
from imprompt.core.errors import ImpromptError
from imprompt.core.images import (
    bytes_of_pixels,
    image_grid,
    image_to_pixels,
    open_image,
    pixels_of_bytes,
    pixels_to_images,
    resize_and_center_crop,
)


@pytest.fixture
def photo():
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_palette_cmyk_and_grey_become_rgb(photo, tmp_path):
    for name, image in {
        "palette.png": photo.quantize(16),
        "cmyk.jpg": photo.convert("CMYK"),
        "grey.png": photo.convert("L"),
        "bit.png": photo.convert("1"),
    }.items():
        image.save(tmp_path / name)
        opened = open_image(tmp_path / name)
        assert opened.mode == "RGB" and opened.size == (60, 40), name


def test_sixteen_bits_keep_their_brightness(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    values = np.asarray(open_image(tmp_path / "deep.png"))
    assert values[0, 0, 0] == 0 and values[-1, -1, 0] == 255
    assert abs(int(values[32, 0, 0]) - 128) < 3


def test_exif_orientation_is_applied(photo, tmp_path):
    exif = photo.getexif()
    exif[0x112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").size == (40, 60)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((3, 3)) == (255, 0, 0)


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)


def test_one_pixel_is_an_image(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    assert resize_and_center_crop(open_image(tmp_path / "one.png"), 8).size == (8, 8)


def test_what_is_no_whole_image_is_refused_in_one_line(photo, tmp_path, monkeypatch):
    photo.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.png", "empty.png", "missing.png", "."):
        with pytest.raises(ImpromptError) as caught:
            open_image(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ImpromptError, match="60 × 40"):
        open_image(tmp_path / "whole.jpg")


def test_the_shortest_side_is_resized_and_the_middle_kept():
    wide = Image.new("RGB", (90, 30), "blue")
    wide.paste("red", (30, 0, 60, 30))
    square = resize_and_center_crop(wide, 15)
    assert square.size == (15, 15)
    assert square.getpixel((7, 7)) == (255, 0, 0)


def test_pixels_and_images_are_inverse(photo):
    pixels = image_to_pixels(photo)
    assert pixels.shape == (3, 40, 60) and pixels.min() >= -1 and pixels.max() <= 1
    assert np.array_equal(np.asarray(pixels_to_images(pixels[None])[0]), np.asarray(photo))
    assert pixels_to_images(torch.full((1, 3, 2, 2), 9.0))[0].getpixel((0, 0)) == (255,) * 3


def test_a_grid_has_a_cell_for_each(photo):
    assert image_grid([photo] * 5, columns=2).size == (120, 120)
    assert image_grid([photo], columns=1, labels=["one"]).height > 40
    with pytest.raises(ImpromptError):
        image_grid([], columns=2)
    with pytest.raises(ImpromptError, match="2 labels"):
        image_grid([photo], columns=1, labels=["a", "b"])


def test_bytes_and_pixels_are_each_others_inverse():
    values = torch.arange(256, dtype=torch.uint8)
    pixels = pixels_of_bytes(values)
    assert (pixels.dtype, pixels[0], pixels[-1]) == (torch.float32, -1, 1)
    assert torch.equal(bytes_of_pixels(pixels), values)
    assert bytes_of_pixels(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]
