"""What the vision tower made of a sample's pictures, whole or merged: in memory, in a file, and in front of a prompt."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trim_plugin.arithmetic import tile_tokens
from trim_plugin.forward.encoded import EncodedSample
from trim_plugin.forward.finding import find_model
from trim_plugin.pictures import stored
from trim_plugin.pictures.fingerprint import fingerprint, is_other
from trim_plugin.pictures.layout import prompt_inputs


@dataclasses.dataclass
class Pictures(EncodedSample):
    """The pictures of one sample, encoded: `TrimmedCache(model, config, pictures=...)` answers questions without the tower.

    `first + second` are the pictures of both in a row, for instance a document's pages that were encoded one by one.

    Args:
        states: (tokens, width of the text model), visual states.
        index: int64 (tokens,), which visual token each is, ascending.
        sizes: int64 (tokens,), how many visual tokens each stands for.
        total: visual tokens of the pictures, padding tiles and merged ones included.
        tiles: real tiles of every picture.
        most_tiles: tiles that the model pads every picture to.
        tile_tokens: visual tokens of a tile.
        mark: which model encoded them, see `fingerprint`.
        rule: what chose the tokens; "whole" if nothing did.
        tower_share: share of the patches that went on through the vision tower, the smallest if there are several; None if it was
            untouched.

    Example:
        >>> from trim_plugin import KCenter, TrimmedCache, encode_pictures
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> model, processor = load_small_model()
        >>> pictures = encode_pictures(model, processor, [examples()[0].picture], rule=KCenter(0.25))
        >>> inputs = pictures.inputs(processor, "Read all digits.")
        >>> pictures
        Pictures(1 picture, 17 of 260 visual tokens, rule='KCenter(0.25)')
        >>> cache = TrimmedCache(model, {"top_k_ratio": 1.0}, pictures=pictures)  # keeps all that was encoded
        >>> output = model.generate(**inputs, cache=cache, max_new_tokens=4)
        >>> output.shape[0], "pixel_values" in inputs
        (1, False)
    """

    tiles: list[int]
    most_tiles: int
    tile_tokens: int
    mark: torch.Tensor
    rule: str = "whole"
    tower_share: float | None = None

    def __repr__(self) -> str:
        shown = f"{len(self.tiles)} picture{'s' * (len(self.tiles) != 1)}"
        tower = "" if self.tower_share is None else f", tower_share={self.tower_share}"
        return f"Pictures({shown}, {len(self.index)} of {self.total} visual tokens, rule={self.rule!r}{tower})"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(tensor.nbytes for tensor in (self.states, self.index, self.sizes))

    @property
    def kept_share(self) -> float:
        """Tokens held over those of the pictures' real tiles; above 1 if padding tiles are held as well."""
        return len(self.index) / (sum(self.tiles) * self.tile_tokens)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        stored.write(Path(path), self)

    @classmethod
    def load(cls, path: Path | str, device: str | torch.device = "cpu") -> Pictures:
        """Read what `save` wrote, into memory: what happens to the file afterwards changes nothing here.

        Args:
            path: the file.
            device: where the tensors go; a forward takes them to the model's.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: it cannot be read.
            ValueError: it is cut off, damaged in any byte (a checksum tells), of another kind or version, or no file.
        """
        return cls(**stored.read(Path(path), device))

    def to(self, device: str | torch.device) -> Pictures:
        """These pictures with their tensors on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("states", "index", "sizes")}
        return dataclasses.replace(self, **moved)

    def inputs(
        self, processor: Any, text: str | Sequence[Mapping[str, Any]], device: str | torch.device = "cpu"
    ) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `cross_attention_mask` of a prompt about these pictures, as the processor makes them.

        Args:
            processor: the model's `MllamaProcessor`.
            text: a question; or messages of a chat whose pictures are these, in their order; or a prompt that holds the image
                token as often as there are pictures.
            device: where the tensors go.

        Raises:
            ValueError: the prompt has another number of pictures.
        """
        return prompt_inputs(processor, [self.tiles], [text], self.most_tiles, device)

    def __add__(self, later: Pictures) -> Pictures:
        if not isinstance(later, Pictures):
            return NotImplemented
        layouts = (self.most_tiles, self.tile_tokens), (later.most_tiles, later.tile_tokens)
        if layouts[0] != layouts[1] or is_other(self.mark, later.mark):
            raise ValueError("These pictures were encoded by two different models. Encode them again by one.")
        shares = [share for share in (self.tower_share, later.tower_share) if share is not None]
        return dataclasses.replace(
            self,
            states=torch.cat([self.states, later.states.to(self.states)]),
            index=torch.cat([self.index, later.index.to(self.index) + self.total]),
            sizes=torch.cat([self.sizes, later.sizes.to(self.sizes)]),
            total=self.total + later.total,
            tiles=self.tiles + later.tiles,
            rule=self.rule if self.rule == later.rule else f"{self.rule}, {later.rule}",
            tower_share=min(shares, default=None),
        )

    def check_fits(self, model: torch.nn.Module, known: dict[str, Any] | None = None) -> None:
        """Raise `ValueError` unless this model encoded the pictures, with the adapters of now: merged or not, in any format."""
        own = find_model(model)
        vision = own.config.vision_config
        layout = (vision.max_num_tiles, tile_tokens(vision), own.config.text_config.hidden_size)
        if layout != (self.most_tiles, self.tile_tokens, self.states.shape[-1]):
            raise ValueError(
                f"These pictures were encoded by another model: {self.most_tiles} tiles of {self.tile_tokens} tokens of "
                f"width {self.states.shape[-1]}, but this one has {layout[0]} of {layout[1]} of width {layout[2]}. "
                "Encode them again: encode_pictures(model, ...)."
            )
        known = {} if known is None else known
        if "fingerprint" not in known:
            known["fingerprint"] = fingerprint(own)
        other = is_other(self.mark, known["fingerprint"])
        if other is None:
            _warn_unknown()
        elif other:
            raise ValueError(
                "These pictures were encoded by another model, or its vision tower or projector was trained since, or has other "
                "adapters or scales now. Encode them again: encode_pictures(model, ...)."
            )


@functools.cache
def _warn_unknown() -> None:
    warnings.warn(
        "Whether this model encoded these pictures cannot be told: its projector and tower are offloaded, or spread over "
        "processes.",
        UserWarning,
        stacklevel=4,
    )
