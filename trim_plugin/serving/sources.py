"""Where a request's pictures come from: from the request itself, and from nowhere else unless the operator says so."""

from __future__ import annotations

import base64
import binascii
import re
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from trim_plugin.asking.prompts import decoded
from trim_plugin.asking.rows import RowError
from trim_plugin.durable import open_regular
from trim_plugin.pictures.prompting import BROKEN, opened
from trim_plugin.serving.limits import Limits, RequestError

_DATA = re.compile(r"data:image/[a-zA-Z0-9.+-]+;base64,")
#: A host that was allowed shall not hold a request up for longer.
FETCH_SECONDS = 20.0


def picture_bytes(url: str, limits: Limits) -> bytes:
    """The file behind a picture's address.

    Args:
        url: `data:image/...;base64,...`; `file://...` or a path if the limits allow a folder; `http(s)://...` of an allowed host.
        limits: what may be opened.

    Raises:
        RequestError: the address is not allowed, or leads to nothing.

    Example:
        >>> picture_bytes("/etc/hostname", Limits())
        Traceback (most recent call last):
        ...
        trim_plugin.serving.limits.RequestError: this server takes pictures only as data:image/...;base64,... addresses
    """
    found = _DATA.match(url)
    if found is not None:
        try:
            return base64.b64decode(url[found.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(400, f"a picture's base64 is broken: {error}") from None
    try:
        address = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise RequestError(400, f"a picture's address is broken: {error}") from None
    if address.scheme in ("http", "https") and limits.hosts:
        return _fetched(address, limits)
    if address.scheme in ("", "file") and limits.folder is not None:
        return _read(urllib.parse.unquote(address.path) if address.scheme else url, limits.folder, limits.body_bytes)
    allowed = ["data:image/...;base64,... addresses"]
    allowed += ["files in its folder"] if limits.folder is not None else []
    allowed += [f"addresses at {', '.join(sorted(limits.hosts))}"] if limits.hosts else []
    raise RequestError(400, f"this server takes pictures only as {' or '.join(allowed)}")


def checked_picture(data: bytes, limits: Limits, take: Callable[[int], None] | None = None) -> Image.Image:
    """The picture of a file, as RGB, once its size is known to be within bounds.

    Args:
        data: the file.
        limits: bounds.
        take: called with the number of its pixels before it is decoded; may raise.

    Raises:
        RequestError: it is no picture, is cut off, or has too many pixels.
    """
    try:
        with opened(data) as picture:
            width, height = picture.size
    except Image.DecompressionBombError:
        raise RequestError(413, f"a picture has more than {limits.pixels} pixels, this server's most") from None
    except BROKEN:
        raise RequestError(400, "a picture cannot be read: not a format that Pillow knows, or cut off") from None
    if width * height > limits.pixels:
        raise RequestError(
            413, f"a picture of {width} x {height} has more than {limits.pixels} pixels, this server's most"
        )
    if take is not None:
        take(width * height)
    try:
        return decoded(data)
    except RowError:
        raise RequestError(400, "a picture cannot be decoded: its file is cut off or broken") from None


def _read(name: str, folder: Path, most: int) -> bytes:
    """A file inside the folder; links that lead out of it are followed first, so they count as outside."""
    refused = RequestError(400, "no such picture in this server's folder")
    try:
        root = folder.resolve(strict=True)
        path = (root / name).resolve(strict=True)
        if not path.is_relative_to(root):
            raise refused
        with open_regular(path) as file:
            data = file.read(most + 1)
    except (OSError, ValueError):
        raise refused from None
    if len(data) > most:
        raise refused
    return data


def _fetched(address: urllib.parse.SplitResult, limits: Limits) -> bytes:
    """What an allowed host answers; redirects are not followed, since they may lead to another."""
    from huggingface_hub.utils import httpx

    if address.hostname not in limits.hosts:
        raise RequestError(400, f"this server fetches pictures only from {', '.join(sorted(limits.hosts))}")
    data, end = bytearray(), time.monotonic() + FETCH_SECONDS
    try:
        with httpx.stream("GET", address.geturl(), timeout=FETCH_SECONDS, follow_redirects=False) as response:
            if response.status_code != 200:
                raise RequestError(400, f"a picture's address answers with status {response.status_code}")
            for chunk in response.iter_bytes():
                data += chunk
                if time.monotonic() > end:
                    raise RequestError(400, f"a picture's address took more than {FETCH_SECONDS:g} seconds")
                if len(data) > limits.body_bytes:
                    raise RequestError(413, f"a picture's file has more than {limits.body_bytes} bytes")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RequestError(400, f"a picture cannot be fetched: {type(error).__name__}") from None
    return bytes(data)
