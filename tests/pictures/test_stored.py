"""Files of encoded pictures: what is read is what was written, or a ValueError says why not."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trim_plugin import KCenter, Pictures, encode_pictures
from trim_plugin.embedded import examples
from trim_plugin.pictures import stored

from .conftest import assert_equal


@pytest.fixture(scope="module")
def data(page, tmp_path_factory):
    """A file of pictures, as bytes."""
    path = tmp_path_factory.mktemp("pictures") / "page.safetensors"
    page.save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Where files are written to be read; one place for all, since hypothesis tries many."""
    return tmp_path_factory.mktemp("damaged") / "page.safetensors"


def refused(path, data):
    """Whether bytes are refused as a file of pictures; if not, the pictures."""
    path.write_bytes(data)
    try:
        return Pictures.load(path)
    except ValueError as error:
        said = str(error)
        assert str(path) in said
        assert "ncode the pictures again" in said or "Pictures.save writes such files" in said
        said.encode()  # it can be printed
        assert len(said) < 800
        return None


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_loaded_is_what_was_saved(page, tmp_path, dtype):
    saved = copy.copy(page)
    saved.states = page.states.to(dtype).flip(0).flip(0)[:, ::1]
    saved.save(tmp_path / "page.safetensors")
    again = Pictures.load(tmp_path / "page.safetensors")
    assert_equal(saved, again)
    assert [file.name for file in tmp_path.iterdir()] == ["page.safetensors"]
    theirs = load_file(tmp_path / "page.safetensors")
    assert torch.equal(theirs["states"], saved.states)
    assert torch.equal(theirs["index"].long(), saved.index)
    assert metadata_of(tmp_path / "page.safetensors")["version"] == str(stored.VERSION)


def test_a_quarter_takes_a_quarter_of_the_room(small, tmp_path):
    picture = next(example.picture for example in examples() if Image.open(example.picture).size[0] > 60)
    sizes = []
    for name, rule in (("whole", None), ("quarter", KCenter(0.25))):
        pictures = encode_pictures(*small, [picture], rule=rule)
        pictures.save(tmp_path / name)
        sizes.append(pictures.states.nbytes)
        assert (tmp_path / name).stat().st_size < pictures.nbytes + pictures.mark.nbytes + 1000
    assert sizes[1] <= 0.26 * sizes[0]


def checksum(header, body):
    """CRC-32 of the fields and of every tensor's name, dtype, shape and bytes, as docs/tutorials/encode-once.md has it."""
    value = zlib.crc32(header["__metadata__"]["pictures"].encode())
    for name in ("index", "sizes", "mark", "states"):
        entry = header[name]
        begin, end = entry["data_offsets"]
        value = zlib.crc32(f"{name} {entry['dtype']} {tuple(entry['shape'])}".encode(), value)
        value = zlib.crc32(body[begin:end], value)
    return f"{value:08x}"


def resealed(data, change):
    """A file's bytes with another header, whose checksum is right again where there can be one."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    change(header)
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        header["__metadata__"]["checksum"] = checksum(header, body)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def set_field(**changes):
    def change(header):
        fields = json.loads(header["__metadata__"]["pictures"])
        header["__metadata__"]["pictures"] = json.dumps({**fields, **changes})

    return change


def test_changed_headers_are_read_where_they_say_the_same(page, data, damaged):
    damaged.write_bytes(resealed(data, lambda header: None))
    assert_equal(Pictures.load(damaged), page)


FIELDS = {
    "no tiles": {"tiles": []},
    "too many tiles": {"tiles": [5]},
    "tiles of text": {"tiles": ["1"]},
    "a bool": {"tiles": [True]},
    "tiles are none": {"tiles": None},
    "another total": {"total": 261},
    "a negative total": {"total": -260},
    "a huge total": {"total": 10**400},
    "a fraction": {"tile_tokens": 65.0},
    "no rule": {"rule": None},
    "a share of 0": {"tower_share": 0},
    "a share that is none": {"tower_share": float("nan")},
    "a share of text": {"tower_share": "1"},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_wrong_fields_are_said_even_with_a_right_checksum(data, damaged, fields):
    assert refused(damaged, resealed(data, set_field(**fields))) is None


ENTRIES = {
    "a dtype of codes": ("states", {"dtype": "U8"}),
    "a dtype that is none": ("states", {"dtype": ["F32"]}),
    "a float index": ("index", {"dtype": "F32"}),
    "another shape": ("states", {"shape": [1, 2]}),
    "a place beyond the file": ("states", {"data_offsets": [0, 10**12]}),
    "no place": ("states", {"data_offsets": None}),
}


@pytest.mark.parametrize(("name", "changes"), ENTRIES.values(), ids=ENTRIES)
def test_wrong_tensors_are_said(data, damaged, name, changes):
    assert refused(damaged, resealed(data, lambda header: header[name].update(changes))) is None


def rewritten(path, change_tensors=lambda tensors: tensors, **metadata):
    """As somebody else's tool would write it."""
    tensors, before = load_file(path), metadata_of(path)
    save_file(change_tensors(tensors), path, metadata={**before, **metadata})


DAMAGED = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), ""),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"!"), ""),
    "empty": (lambda path: path.write_bytes(b""), ""),
    "text": (lambda path: path.write_text("hello"), ""),
    "deep": (lambda path: path.write_bytes(struct.pack("<Q", 10**6) + b"[" * 10**6), "RecursionError"),
    "many digits": (lambda path: path.write_bytes(struct.pack("<Q", 5002) + b"[" + b"1" * 5000 + b"]"), ""),
    "a list": (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"), "its header is no object"),
    "no version": (lambda path: rewritten(path, version="two"), ""),
    "another digit": (lambda path: rewritten(path, version="²"), ""),
    "no checksum": (lambda path: rewritten(path, checksum=""), "the checksum differs"),
    "another rule": (lambda path: rewritten(path, pictures="{}"), "the checksum differs"),
    "a tensor is missing": (
        lambda path: rewritten(path, lambda tensors: {n: t for n, t in tensors.items() if n != "sizes"}),
        "sizes",
    ),
    "other states": (
        lambda path: rewritten(path, lambda tensors: tensors | {"states": tensors["states"] + 1e-6}),
        "the checksum differs",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), DAMAGED.values(), ids=DAMAGED)
def test_pictures_file_damaged(data, tmp_path, spoil, message):
    path = tmp_path / "page.safetensors"
    path.write_bytes(data)
    spoil(path)
    with pytest.raises(ValueError, match=f"is cut off or damaged .*{message}"):
        Pictures.load(path)


def test_pictures_file_foreign(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="not one of encoded pictures"):
        Pictures.load(tmp_path / "weights")


@pytest.mark.parametrize("version", [str(stored.VERSION + 1), "9" * 9999], ids=len)
def test_pictures_file_of_a_later_version(page, tmp_path, version):
    page.save(tmp_path / "page")
    rewritten(tmp_path / "page", version=version)
    with pytest.raises(ValueError, match="was written by a later version of trim_plugin"):
        Pictures.load(tmp_path / "page")


def test_pictures_file_of_an_earlier_version(page, tmp_path):
    page.save(tmp_path / "page")
    save_file(load_file(tmp_path / "page"), tmp_path / "page", {"kind": stored.KIND, "version": "1"})  # had no checksum
    with pytest.raises(ValueError, match=r"an earlier version of trim_plugin \(layout 1\).*Encode the pictures again"):
        Pictures.load(tmp_path / "page")


def test_pictures_file_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of encoded pictures"):
        Pictures.load(tmp_path / "page.safetensors")


def test_pictures_file_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "named pipe"), (tmp_path, "folder")):
        with pytest.raises(ValueError, match=rf"cannot read .*: it is a {kind}, not a file\. Give a file that"):
            Pictures.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        lambda page: {"index": page.index + page.total},
        lambda page: {"index": page.index.flip(0)},
        lambda page: {"sizes": 0 * page.sizes},
        lambda page: {"sizes": page.sizes[1:]},
        lambda page: {"states": page.states[None]},
        lambda page: {"total": page.total + 1},
    ],
)
def test_tensors_that_do_not_fit_together_are_said(page, tmp_path, changes):
    odd = copy.copy(page)
    vars(odd).update(changes(page))
    odd.save(tmp_path / "odd")
    with pytest.raises(ValueError, match="its tensors don't fit together"):
        Pictures.load(tmp_path / "odd")


@given(drawn=st.data())
def test_any_damage_is_said_or_changes_nothing(page, data, damaged, drawn):
    spoiled = bytearray(data)
    for place in drawn.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
        spoiled[place] = drawn.draw(st.integers(0, 255))
    cut = drawn.draw(st.sampled_from([len(data), drawn.draw(st.integers(0, len(data)))]))
    found = refused(damaged, bytes(spoiled[:cut]))
    if found is not None:  # a blank in the header, or a byte that was drawn as it was
        assert_equal(found, page)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800") | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("\ud800"), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(drawn=st.data())
def test_any_header_is_read_or_said(page, data, damaged, drawn):
    def change(header):
        place = header
        name = drawn.draw(st.sampled_from(["__metadata__", *stored.TENSORS]))
        if drawn.draw(st.booleans()):
            place, name = header[name], drawn.draw(st.sampled_from(sorted(header[name])))
        value = drawn.draw(JSON)
        if drawn.draw(st.booleans()):
            del place[name]
        else:
            place[name] = value

    found = refused(damaged, resealed(data, change))
    if found is not None:
        assert_equal(found, page)


@given(value=JSON, name=st.sampled_from([*stored.NUMBERS, "tower_share", "new"]))
def test_any_field_is_read_or_said(page, data, damaged, value, name):
    found = refused(damaged, resealed(data, set_field(**{name: value})))
    if found is not None and name not in ("rule", "tower_share"):
        assert_equal(found, page)


@settings(max_examples=200)
@given(st.binary(max_size=60), st.sampled_from([None, 0, 2, 8, 16, 2**24, 2**63]))
def test_any_bytes_are_said(damaged, data, length):
    whole = data if length is None else struct.pack("<Q", length) + data
    assert refused(damaged, whole) is None
