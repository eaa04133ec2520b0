"""Encoded pictures in a folder: a picture that many rows ask about goes through the vision tower once, also in later runs."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from trim_plugin.pictures.encoded import Pictures
from trim_plugin.pictures.encoding import encode_pictures
from trim_plugin.pictures.rgb import to_rgb
from trim_plugin.selection.processors import checked_share


class PictureFolder:
    """Encodes pictures whole and keeps each in a file of its own, under what it shows: the answers stay the same.

    Files of another model, or of one whose tower was trained since, are written anew. Nothing is ever removed: delete the folder,
    or files of it, whenever you like.

    Args:
        folder: made if need be.
        model: an Mllama model or a wrapper around one.
        processor: its `MllamaProcessor`.
        tower_share: as for `encode_pictures`; each share has files of its own.

    Raises:
        OSError: the folder cannot be made.

    Example:
        >>> import tempfile
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> from trim_plugin.pictures.prompting import open_picture
        >>> remember = PictureFolder(tempfile.mkdtemp(), *load_small_model())
        >>> page = open_picture(examples()[0].picture)
        >>> remember([page]).tiles == remember([page, page]).tiles[:1], remember.encoded
        (True, 1)
    """

    def __init__(self, folder: Path | str, model: Any, processor: Any, *, tower_share: float | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._model, self._processor, self._tower_share = model, processor, checked_share(tower_share)
        #: How many pictures went through the tower.
        self.encoded = 0

    def __call__(self, pictures: Sequence[Image.Image]) -> Pictures:
        """These pictures in a row, in main memory."""
        return functools.reduce(operator.add, [self._one(to_rgb(picture)) for picture in pictures])

    def _one(self, picture: Image.Image) -> Pictures:
        own = () if self._tower_share is None else (self._tower_share,)
        kind = repr((picture.size, str(self._model.dtype), *own))
        shown = hashlib.blake2b(kind.encode() + picture.tobytes(), digest_size=20)
        file = self.folder / f"{shown.hexdigest()}.safetensors"
        try:
            found = Pictures.load(file)
            found.check_fits(self._model)
            return found
        except (FileNotFoundError, ValueError):
            pass  # not there yet, cut off, or another model's
        self.encoded += 1
        made = encode_pictures(self._model, self._processor, [picture], tower_share=self._tower_share).to("cpu")
        made.save(file)
        return made
