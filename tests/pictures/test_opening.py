"""Pictures of every kind reach the model as a user sees them, and stock's command line as stock would read them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from trim_plugin.embedded import load_small_model
from trim_plugin.pictures.prompting import build_inputs, open_picture
from trim_plugin.pictures.rgb import to_rgb

#: Modes of which Mllama's processor makes what a user sees; the others it clips, or cannot read.
READ_BY_THE_PROCESSOR = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
OTHERS = ("La", "RGBa", "I", "F", "I;16", "I;16B", "I;16L")
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def processor():
    return load_small_model()[1]


def gradient(mode: str) -> Image.Image:
    """A picture whose left is dark and whose right is light, in any mode."""
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1))
    grey = Image.fromarray(ramp)
    if mode in ("I", "F"):
        return grey.convert(mode)
    if mode.startswith("I;16"):
        values = (ramp.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2")
        return Image.frombytes(mode, (64, 32), values.tobytes())
    if mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        alpha = Image.fromarray(np.where(np.arange(64) % 2, 255, 90)[None].repeat(32, 0).astype(np.uint8))
        if mode in ("LA", "La"):
            return Image.merge("LA", (grey, alpha)).convert(mode)
        coloured = Image.merge("RGBA", (grey, grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT), grey, alpha))
        return Image.merge("LA", (grey, alpha)).convert("PA") if mode == "PA" else coloured.convert(mode)
    coloured = Image.merge("RGB", (grey, grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT), grey))
    if mode == "LAB":
        return Image.merge("LAB", coloured.split())
    return coloured.convert(mode)


@pytest.mark.parametrize("mode", READ_BY_THE_PROCESSOR)
def test_a_picture_is_what_the_processor_makes_of_it(processor, mode):
    picture = gradient(mode)
    theirs = processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    ours = processor.image_processor(images=[to_rgb(picture)], return_tensors="pt")["pixel_values"]
    assert torch.equal(ours, theirs)
    assert picture.mode == mode, "the user's picture is not changed"


@pytest.mark.parametrize("mode", OTHERS)
def test_modes_that_the_processor_cannot_read_go_from_dark_to_light(mode):
    seen = np.asarray(to_rgb(gradient(mode)).convert("L")).astype(int)
    assert seen.shape == (32, 64)
    first, last = seen[0, 0], seen[0, -1]
    if mode in ("La", "RGBa"):  # a see-through dark left over white
        assert first > 100
        assert np.array_equal(seen, np.asarray(to_rgb(gradient(mode.replace("a", "A"))).convert("L")))
        return
    assert (first, last) == (0, 252)
    assert (np.diff(seen, axis=1) >= 0).all()


def test_every_mode_of_pillow_is_tried():
    # I;16N is the machine's own of I;16L and I;16B.
    assert set(Image.MODES) <= {*READ_BY_THE_PROCESSOR, *OTHERS, "I;16N"}


def test_black_text_on_transparent_stays_readable(tmp_path):
    picture = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (10, 10, 20, 20))
    picture.save(tmp_path / "text.png")
    opened = open_picture(tmp_path / "text.png")
    assert opened.mode == "RGB"
    assert (opened.getpixel((0, 0)), opened.getpixel((15, 15))) == ((255,) * 3, (0,) * 3)


def test_a_transparent_colour_of_a_palette_or_a_grey_is_white(tmp_path):
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    palette.putpixel((3, 3), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert open_picture(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(tmp_path / "palette.png").getpixel((3, 3)) == (200, 10, 10)
    wide = Image.fromarray(np.array([[7, 60000]], dtype=np.uint16))
    wide.info["transparency"] = 7
    assert [to_rgb(wide).getpixel((x, 0))[0] for x in range(2)] == [255, 233]


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(8, 0)
    Image.fromarray(values).save(tmp_path / "wide.png")
    seen = np.asarray(open_picture(tmp_path / "wide.png"))[0, :, 0].astype(float)
    np.testing.assert_allclose(seen, values[0] / 257, atol=0.51)
    dark = (values // 300).astype(np.uint16)  # a dark one is not brightened
    Image.fromarray(dark).save(tmp_path / "dark.png")
    assert np.asarray(open_picture(tmp_path / "dark.png")).max() == 1


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("F", [0.0, 0.5, 1.0], [0, 128, 255]),
        ("F", [0.0, 100.0, 255.0], [0, 100, 255]),
        ("F", [-10.0, 0.0, 10.0], [0, 128, 255]),
        ("I", [0, 100, 255], [0, 100, 255]),
        ("I", [0, 257, 65535], [0, 1, 255]),
        ("I", [-5, 0, 100000], [0, 0, 255]),
    ],
)
def test_numbers_without_a_fixed_white(mode, values, expected):
    dtype = np.float32 if mode == "F" else np.int32
    picture = Image.fromarray(np.array([values], dtype=dtype))
    assert picture.mode == mode
    assert [to_rgb(picture).getpixel((x, 0))[0] for x in range(3)] == expected


def test_nan_is_said(tmp_path):
    Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(ValueError, match=r"cannot read the picture .*nan\.tiff: the picture holds NaN or inf"):
        open_picture(tmp_path / "nan.tiff")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff"])
def test_a_photo_is_turned_upright(tmp_path, processor, orientation, suffix):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (3, 4, 3), dtype=np.uint8)).resize((80, 60))
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    sideways = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    sideways.save(tmp_path / f"photo{suffix}", exif=exif, **({"quality": 100} if suffix == ".jpg" else {}))
    seen = np.asarray(open_picture(tmp_path / f"photo{suffix}")).astype(int)
    assert seen.shape == (60, 80, 3)
    assert np.abs(seen - np.asarray(upright).astype(int)).mean() < 8
    with Image.open(tmp_path / f"photo{suffix}") as as_it_lies:
        given = build_inputs(processor, "What?", [as_it_lies])["pixel_values"]
        turned = build_inputs(processor, "What?", [ImageOps.exif_transpose(as_it_lies)])["pixel_values"]
    assert torch.equal(given, turned)


def test_an_animation_gives_its_first_frame_and_says_so(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"moving\.gif holds 3 pictures: the first is read"):
        opened = open_picture(tmp_path / "moving.gif")
    assert opened.getpixel((0, 0)) == (255, 0, 0)
    frames[0].save(tmp_path / "still.gif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_picture(tmp_path / "still.gif")


def test_a_phones_photo_with_previews_is_one_picture(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "photo.mpo", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_picture(tmp_path / "photo.mpo").getpixel((0, 0))[0] > 200


def test_a_picture_too_large_to_be_opened_is_said(tmp_path, monkeypatch):
    Image.new("RGB", (50, 50)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"cannot read the picture .*huge\.png: Image size"):
        open_picture(tmp_path / "huge.png")


def test_a_picture_that_was_cut_off_is_said(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((200, 200), 50).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cannot read the picture .*cut\.jpg"):
        open_picture(tmp_path / "cut.jpg")
