"""Pictures that are asked about again: encoded once, remembered as long as there is room, in a folder for later runs too."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trim_plugin.forward.tower import find_model
from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.encoding import encode_pictures
from trim_plugin.pictures.fingerprint import fingerprint
from trim_plugin.pictures.rgb import to_rgb
from trim_plugin.selection.processors import ProcessorLike

#: Bytes that are held unless something else is said: 20 whole pictures of the 11B model in bfloat16.
DEFAULT_BYTES = 2**30


class RecentPictures:
    """Encodes pictures and keeps the ones asked for last, each under what it shows: several questions, one call of the tower.

    What is held lies in main memory; a generation takes it to the model's device, a piece of the batch at a time.

    Args:
        model: an Mllama model, or a wrapper around one. Its weights, adapters and their scales may change: pictures of before
            are not given then.
        processor: its `MllamaProcessor`.
        rule: as for `encode_pictures`; None is whole, with the same answers as the pictures themselves.
        most_bytes: of encoded pictures that are held at a time, in main memory; the least recently asked for go first.
        folder: where whole pictures are kept on disk as well, a file each, made if need be; later runs find them there. Files of
            another model, of other adapters, or of a tower that was trained since, are written anew. Nothing is ever removed:
            delete the folder, or files of it, whenever you like. None keeps nothing on disk.

    Raises:
        ValueError: `most_bytes` is negative, or a folder is given with a rule.
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
        rule: ProcessorLike | None = None,
        most_bytes: int = DEFAULT_BYTES,
        folder: Path | str | None = None,
    ) -> None:
        if most_bytes < 0:
            raise ValueError(f"most_bytes must be 0 or more, got {most_bytes}.")
        if folder is not None and rule is not None:
            raise ValueError("folder and rule are both given, but files there hold whole pictures. Choose one.")
        self._model, self._processor, self._rule = model, processor, rule
        self._most_bytes = most_bytes
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._held: OrderedDict[tuple[Any, ...], Pictures] = OrderedDict()
        #: How often a picture went through the tower.
        self.encoded = 0
        #: How often one that was held, or lay in the folder, was asked for.
        self.reused = 0

    def __call__(self, pictures: Sequence[Image.Image], tower_share: float | None = None) -> Pictures:
        """These pictures in a row, encoded now or earlier.

        Args:
            pictures: the pictures.
            tower_share: as for `encode_pictures`; each share has encoded pictures of its own.

        Raises:
            ValueError: no picture is given, or as for `encode_pictures`.
            OSError: a file of the folder cannot be written.
        """
        if not pictures:
            raise ValueError("No picture was given to RecentPictures. Ask about text alone without it.")
        return functools.reduce(operator.add, [self._one(to_rgb(picture), tower_share) for picture in pictures])

    @property
    def nbytes(self) -> int:
        """Bytes of the pictures held now."""
        return sum(picture.nbytes for picture in self._held.values())

    def forget(self) -> None:
        """Hold nothing any more."""
        self._held.clear()

    def _one(self, picture: Image.Image, tower_share: float | None) -> Pictures:
        # What is held under one adapter is no answer under another, and is held for when that one comes back.
        weights = hashlib.blake2b(fingerprint(find_model(self._model)).numpy().tobytes(), digest_size=20).digest()
        shown = hashlib.blake2b(picture.tobytes(), digest_size=20).digest()
        key = (picture.size, tower_share, shown, weights)
        held = self._held.get(key)
        file = None if held is not None or self._folder is None else self._folder / self._name(picture, tower_share)
        found = held if file is None else self._stored(file)
        if found is None:
            made = encode_pictures(self._model, self._processor, [picture], self._rule, tower_share=tower_share)
            found = made.to("cpu")
            self.encoded += 1
            if file is not None:
                try:
                    found.save(file)
                except OSError as error:
                    said = f"cannot keep encoded pictures here: {error.strerror}"
                    raise OSError(error.errno, said, str(file.parent)) from None
        else:
            self.reused += 1
        self._held[key] = found
        self._held.move_to_end(key)
        while self.nbytes > self._most_bytes:
            self._held.popitem(last=False)
        return found

    def _name(self, picture: Image.Image, tower_share: float | None) -> str:
        """Of the picture's file: what it shows, and what else its encoding depends on."""
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
