"""Pictures of every kind reach the model as a user sees them, and stock's command line as stock would read them."""

from __future__ import annotations

import ast
import io
import os
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageOps

import trim_plugin
from trim_plugin import open_picture
from trim_plugin.asking.prompts import decoded, read_prompt
from trim_plugin.asking.rows import RowError
from trim_plugin.embedded import load_small_model
from trim_plugin.pictures.prompting import build_inputs, written
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


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 40 40
%%EndComments
showpage
%%EOF
"""
#: The same with the header of a DOS file, which Pillow knows as well.
DOS_EPS = struct.pack("<4sIIIIIIH", b"\xc5\xd0\xd3\xc6", 32, len(EPS), 0, 0, 0, 0, 0xFFFF) + b"\0\0" + EPS


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A Ghostscript that leaves a trace where it was run."""
    trace, program = tmp_path / "it-ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{trace}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return trace


@pytest.mark.parametrize("data", [EPS, DOS_EPS], ids=["eps", "dos"])
def test_picture_file_postscript(ghostscript, processor, tmp_path, data):
    file = tmp_path / "x.png"
    file.write_bytes(data)
    for source in (file, str(file), data):
        with pytest.raises(ValueError, match="PostScript is not read, since Pillow would run Ghostscript"):
            open_picture(source)
        with pytest.raises(RowError, match="PostScript is not read"):
            read_prompt(processor, {"images": [source], "question": "?"}, tmp_path)
    with Image.open(file) as not_decoded:
        assert not_decoded.format == "EPS"
        for read in (to_rgb, decoded, lambda picture: build_inputs(processor, "?", [picture])):
            with pytest.raises(ValueError, match="PostScript is not read"):
                read(not_decoded)
    assert not ghostscript.exists()
    with Image.open(file) as not_decoded, pytest.raises(OSError):  # noqa: PT011 - whatever Pillow says of this Ghostscript
        not_decoded.load()
    assert ghostscript.exists(), "it would have been found"


def test_pictures_from_outside_are_opened_in_one_place():
    package = Path(trim_plugin.__file__).parent
    found = [
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open")
    ]
    assert found == ["pictures/prompting.py"]


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a device", "a socket"])
def test_picture_file_not_a_file(tmp_path, monkeypatch, processor, kind):
    path, listening = tmp_path / "x.png", socket.socket(socket.AF_UNIX)
    if kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(tmp_path)  # names of sockets must be short
        listening.bind("x.png")
    with pytest.raises(ValueError, match=f"cannot read the picture .*x.png: it is {kind}, not a file"):
        open_picture(path)
    with pytest.raises(RowError, match=f"cannot read .*x.png: it is {kind}"):
        read_prompt(processor, {"images": ["x.png"], "question": "?"}, tmp_path)
    listening.close()


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "x" * 5000])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises((ValueError, FileNotFoundError), match="picture"):
        open_picture(tmp_path / name)


def test_picture_file_unreadable(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((200, 200), 50).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "text.jpg").write_text("not a picture")
    for name, said in (
        ("cut.jpg", r"cannot read the picture .*cut\.jpg"),
        ("text.jpg", "not a picture that Pillow can"),
    ):
        with pytest.raises(ValueError, match=said):
            open_picture(tmp_path / name)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A PNG whose header promises 50,000 x 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


def test_a_decompression_bomb_is_not_decoded():
    with pytest.raises(ValueError, match="decompression bomb"):
        open_picture(bomb())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "TGA", "PCX"])
def test_what_people_have_is_read(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    stream = io.BytesIO()
    gradient("L" if kind == "PCX" else "RGB").save(stream, kind)
    assert open_picture(stream.getvalue()).mode == "RGB"


@settings(max_examples=60)
@given(
    data=st.binary(max_size=400),
    kind=st.sampled_from([b"", b"%!PS", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF", b"II*\0"]),
)
def test_any_bytes_are_a_picture_or_a_value_error(data, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mode = open_picture(kind + data).mode
        except ValueError:
            mode = "RGB"
    assert mode == "RGB"


def test_messages_with_a_text_alone_are_a_question(processor):
    asked = written(processor, "Which digit is red?", 1)
    for content in ("Which digit is red?", [{"type": "text", "text": "Which digit is red?"}]):
        assert written(processor, [{"role": "user", "content": content}], 1) == asked
