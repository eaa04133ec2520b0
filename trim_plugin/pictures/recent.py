"""Remembers encoded pictures for the next question about them: in memory as long as there is room, and in a folder."""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trim_plugin.arithmetic import checked_share
from trim_plugin.forward.finding import find_model
from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.encoding import encode_each
from trim_plugin.pictures.fingerprint import fingerprint
from trim_plugin.pictures.rgb import to_rgb

#: Bytes that are held unless something else is said: 20 whole pictures of the 11B model in bfloat16.
DEFAULT_BYTES = 2**30
#: What a picture shows, and how the tower has read it.
Key = tuple[tuple[int, int], float | None, bytes]


class RecentPictures:
    """Encodes pictures whole and keeps the ones asked for last, each under what it shows: several questions, one tower call.

    What is held lies in main memory; a generation takes it to the model's device, a piece of the batch at a time.

    Args:
        model: an Mllama model, or a wrapper around one. Its weights, adapters and their scales may change: pictures of before
            are not given then.
        processor: its `MllamaProcessor`.
        most_bytes: of encoded pictures that are held at a time, in main memory; the least recently asked for go first.
        folder: where pictures are kept on disk as well, a file each, made if need be; later runs find them there. Files of
            another model, of other adapters, or of a tower that was trained since, are written anew. Nothing is ever removed:
            delete the folder, or files of it, whenever you like. None keeps nothing on disk.

    Raises:
        ValueError: `most_bytes` is negative.
        OSError: the folder cannot be made.

    Example:
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> from trim_plugin.pictures.prompting import open_picture
        >>> recent = RecentPictures(*load_small_model())
        >>> page = open_picture(examples()[0].picture)
        >>> recent([page]) is recent([page.copy()]), recent.encoded
        (True, 1)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        most_bytes: int = DEFAULT_BYTES,
        folder: Path | str | None = None,
    ) -> None:
        if most_bytes < 0:
            raise ValueError(f"most_bytes must be 0 or more, got {most_bytes}.")
        self._model, self._processor = model, processor
        self._most_bytes = most_bytes
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._held: OrderedDict[tuple[Key, bytes], Pictures] = OrderedDict()
        self.nbytes = 0
        """Bytes of the pictures held now."""
        #: How often a picture went through the tower.
        self.encoded = 0
        #: How often one that was held, or lay in the folder, was asked for.
        self.reused = 0

    def __call__(self, pictures: Sequence[Image.Image], tower_share: float | None = None) -> Pictures:
        """These pictures in a row, encoded now or earlier; each `tower_share` has encoded pictures of its own.

        Raises:
            ValueError: no picture is given, or as for `encode_pictures`.
            OSError: a file of the folder cannot be written.
        """
        return self.several([pictures], tower_share)[0]

    def several(
        self, samples: Sequence[Sequence[Image.Image]], tower_share: float | None = None, at_a_time: int = 1
    ) -> list[Pictures]:
        """The pictures of several samples, each sample's in a row; the vision tower is given at most `at_a_time` in one call.

        Raises:
            ValueError, OSError: as for a call.
        """
        if not all(samples):
            raise ValueError("No picture was given to RecentPictures. Ask about text alone without it.")
        shown = [[to_rgb(picture) for picture in own] for own in samples]
        keys = [[self._key(picture, tower_share) for picture in own] for own in shown]
        # What is held under one adapter is no answer under another, and is held for when that one comes back.
        weights = hashlib.blake2b(fingerprint(find_model(self._model)).numpy().tobytes(), digest_size=20).digest()
        found: dict[Key, Pictures] = {}
        missing: dict[Key, Image.Image] = {}
        for key, picture in zip(itertools.chain(*keys), itertools.chain(*shown), strict=True):
            if key in found or key in missing:
                self.reused += 1
                continue
            held = self._held.get((key, weights))
            if held is None and self._folder is not None:
                held = self._stored(self._folder / self._name(picture, tower_share))
            if held is None:
                missing[key] = picture
            else:
                self.reused += 1
                self._hold((key, weights), held)
                found[key] = held
        waiting = list(missing.items())
        for first in range(0, len(waiting), at_a_time):
            part = waiting[first : first + at_a_time]
            encoded = encode_each(
                self._model, self._processor, [own for _, own in part], tower_share=checked_share(tower_share)
            )
            self.encoded += len(part)
            for (key, picture), made in zip(part, encoded, strict=True):
                found[key] = made.to("cpu")
                self._keep(picture, found[key], tower_share)
                self._hold((key, weights), found[key])
        return [functools.reduce(operator.add, [found[key] for key in own]) for own in keys]

    def _key(self, picture: Image.Image, tower_share: float | None) -> Key:
        return picture.size, tower_share, hashlib.blake2b(picture.tobytes(), digest_size=20).digest()

    def _hold(self, key: tuple[Key, bytes], pictures: Pictures) -> None:
        before = self._held.pop(key, None)
        self.nbytes += pictures.nbytes - (0 if before is None else before.nbytes)
        self._held[key] = pictures
        while self.nbytes > self._most_bytes:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes

    def _keep(self, picture: Image.Image, made: Pictures, tower_share: float | None) -> None:
        """Write it into the folder, if there is one."""
        if self._folder is None:
            return
        try:
            made.save(self._folder / self._name(picture, tower_share))
        except OSError as error:
            said = f"cannot keep encoded pictures here: {error.strerror}"
            raise OSError(error.errno, said, str(self._folder)) from None

    def _name(self, picture: Image.Image, tower_share: float | None) -> str:
        """The name of a picture's file: a hash of what it shows and of what else its encoding depends on."""
        own = () if tower_share is None else (tower_share,)
        kind = repr((picture.size, str(self._model.dtype), *own))
        return hashlib.blake2b(kind.encode() + picture.tobytes(), digest_size=20).hexdigest() + ".safetensors"

    def _stored(self, file: Path) -> Pictures | None:
        try:
            found = Pictures.load(file)
            found.check_fits(self._model)
        except (FileNotFoundError, ValueError):
            return None  # not there yet, cut off, or another model's
        return found
