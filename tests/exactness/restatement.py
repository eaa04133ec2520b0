"""Trimmed and merged generation, restated slowly: every token from a forward of stock's model over the whole text, uncached.

Cross-attention is spelled out: every text row has a list of what it reads, visual tokens one by one or kept ones that stand for
several, each with the log of its size. Shares no code with the package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

#: scores (heads, tokens), the tokens of a visibility group, all states (tokens, width) -> the tokens to keep.
Rule = Callable[[torch.Tensor, list[int], torch.Tensor], set[int]]


@dataclasses.dataclass(frozen=True)
class Turn:
    """One forward of several text rows, or of one that brings pictures: rows from `start` to before `end`."""

    start: int
    end: int
    pictures: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """A kept visual token and those that it stands for, itself included."""

    token: int
    members: list[int]


@dataclasses.dataclass
class Story:
    """What became of one sample: all entries ever made, those that are left, and what every row reads.

    `first` and `later` are (rows, tokens + 2 · entries), −inf where a row does not read, else the log of the size: in the first
    cross-attention layer rows of a prefill read visual tokens one by one, later layers know entries only. Every entry has two
    columns: as the forward that brought it reads it, and as it is stored.
    """

    entries: list[Entry]
    held: list[int]
    first: torch.Tensor
    later: torch.Tensor


class Restatement:
    """Patches a model so that stock's own `generate(use_cache=False)` yields what a trimmed generation must yield.

    Args:
        model: the model; as it was after the `with` block.
        inputs: the whole conversation's inputs, every picture included.
        rule: what is kept of a visibility group; None for exact mode.
        merge: whether dropped tokens join kept ones.
        turns: forwards before and with the last prompt; rows after them are decoding steps. None: the whole prompt is one.
        stored: what becomes of keys and values once the forward that brought them is over:
            `stored(layer, sample, "keys" or "values", the entries' tokens, (entries, heads, head_dim))`.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        rule: Rule | None,
        merge: bool,
        turns: list[Turn] | None = None,
        stored: Callable[[int, int, str, list[int], torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.model, self.inputs, self.rule, self.merge, self.stored = model, inputs, rule, merge, stored
        mask = inputs.get("cross_attention_mask")
        pictures = 0 if mask is None else mask.shape[2]
        self.turns = turns or [Turn(0, inputs["input_ids"].shape[1], pictures)]
        self.layers = [module.cross_attn for module in model.modules() if hasattr(module, "cross_attn")]
        self.stories: list[Story] = []

    def generate(self, new: int, **settings: Any) -> Any:
        """Stock's generation without a cache, on the patched model."""
        with self.patched():
            return self.model.generate(
                **self.inputs,
                max_new_tokens=new,
                use_cache=False,
                **{"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **settings},
            )

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Let the cross-attention of every layer be `attend`."""
        for layer in self.layers:
            layer.forward = lambda hidden_states, cross_attention_states, layer=layer, **_: (
                self.attend(layer, hidden_states, cross_attention_states),
                None,
            )
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    @property
    def kept(self) -> list[list[int]]:
        """Per sample of the last forward the visual tokens that decoding reads."""
        return [[story.entries[entry].token for entry in story.held] for story in self.stories]

    @property
    def sizes(self) -> list[list[int]]:
        """Per sample what each of `kept` stands for."""
        return [[len(story.entries[entry].members) for entry in story.held] for story in self.stories]

    # -- attention ----------------------------------------------------------------------------------------------

    def attend(self, layer: Any, hidden: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """A cross-attention layer over the whole text: (batch, rows, width)."""
        batch, rows, _ = hidden.shape
        states = states.reshape(batch, -1, states.shape[-1])
        queries = layer.q_norm(layer.q_proj(hidden).view(batch, rows, layer.num_heads, layer.head_dim))
        if layer is self.layers[0]:
            self.stories = []
        outputs = []
        for sample in range(batch):
            keys, values = self.project(layer, states[sample])
            if layer is self.layers[0]:
                self.stories.append(self.tell(layer, sample, batch, queries[sample], keys, states[sample]))
            story = self.stories[sample]
            if layer is self.layers[0]:
                own = [averages(tensor, story.entries) for tensor in (keys, values)]
                reads = story.first
            else:
                own = list(self.project(layer, averages(states[sample], story.entries)))
                reads = story.later
            outputs.append(self.read(layer, sample, queries[sample], [keys, values], own, reads))
        return layer.o_proj(torch.stack(outputs))

    def read(
        self, layer: Any, sample: int, queries: torch.Tensor, tokens: Any, entries: Any, reads: torch.Tensor
    ) -> torch.Tensor:
        """Attention of (rows, heads, head_dim) over tokens, entries as they came, and entries as they are stored."""
        stored = entries
        if self.stored is not None:
            names = [entry.token for entry in self.stories[sample].entries]
            stored = [
                self.stored(layer.layer_idx, sample, kind, names, tensor)
                for kind, tensor in zip(("keys", "values"), entries, strict=True)
            ]
        keys, values = (torch.cat(parts) for parts in zip(tokens, entries, stored, strict=True))
        shared = layer.num_heads // keys.shape[1]
        logits = torch.einsum("rhd,thd->hrt", queries, keys.repeat_interleave(shared, 1)) * layer.scaling
        weights = (logits + reads).softmax(dim=-1).nan_to_num(0.0)  # a row that reads nothing gets nothing
        return torch.einsum("hrt,thd->rhd", weights, values.repeat_interleave(shared, 1)).flatten(1)

    def project(self, layer: Any, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of (tokens, width), each (tokens, key-value heads, head_dim)."""
        shape = (len(states), layer.num_key_value_heads, layer.head_dim)
        return layer.k_norm(layer.k_proj(states).view(shape)), layer.v_proj(states).view(shape)

    # -- what is kept, and who reads it -------------------------------------------------------------------------

    def tell(
        self, layer: Any, sample: int, batch: int, queries: torch.Tensor, keys: torch.Tensor, states: torch.Tensor
    ) -> Story:
        """Go through the turns of one sample: choose, merge, and note what every row reads."""
        rows, tokens = len(queries), len(keys)
        source = sample // (batch // len(self.inputs["input_ids"]))
        text = self.inputs["attention_mask"][source].bool().tolist()
        reads = self.spread(source, rows, tokens)
        entries: list[Entry] = []
        held: list[int] = []
        notes: list[tuple[str, int, int, int, float]] = []  # layers, row, "token" column or −1, entry or −1, log size
        seen = 0
        for turn in [*self.turns, *(Turn(row, row + 1, 0) for row in range(self.turns[-1].end, rows))]:
            arriving = list(range(seen, seen + turn.pictures * self.tokens_a_picture(tokens)))
            seen += len(arriving)
            made: list[int] = []
            if arriving:
                past = averages(keys, [entries[entry] for entry in held])
                found = self.choose(
                    layer, queries, keys, past, [entries[entry] for entry in held], arriving, turn, reads, text, states
                )
                made = list(range(len(entries), len(entries) + len(found)))
                entries += found
            decoding = turn.end - turn.start == 1 and not arriving
            for row in range(turn.start, turn.end):
                blind = decoding or not any(reads[row])
                for entry in held:
                    if blind or reads[row][entries[entry].token]:
                        notes.append(("stored", row, -1, entry, math.log(len(entries[entry].members))))
                for token in arriving:
                    if blind or reads[row][token]:
                        notes.append(("first", row, token, -1, 0.0))
                for entry in made:
                    if blind or reads[row][entries[entry].token]:
                        notes.append(("later", row, -1, entry, math.log(len(entries[entry].members))))
            # What the last text row reads is left. Exact mode follows stock, which lets new text read what the last row reads.
            ends = [row for row in range(turn.start, turn.end) if self.rule is None or decoding or text[row]]
            last = reads[ends[-1]] if ends else [True] * tokens
            held = [entry for entry in held + made if decoding or not any(last) or last[entries[entry].token]]
        first = torch.full((rows, tokens + 2 * len(entries)), -math.inf)
        later = first.clone()
        for kind, row, token, entry, log_size in notes:
            if kind == "first":
                first[row, token] = log_size
            elif kind == "later":
                later[row, tokens + entry] = log_size
            else:
                first[row, tokens + len(entries) + entry] = later[row, tokens + len(entries) + entry] = log_size
        return Story(entries, held, first, later)

    def spread(self, source: int, rows: int, tokens: int) -> list[list[bool]]:
        """For every row and visual token whether the mask lets it read; decoding reads what the last row of the prompt reads."""
        tiles = self.inputs["cross_attention_mask"][source].flatten(1).bool()
        given = tiles.repeat_interleave(tokens // tiles.shape[1], dim=1)
        return torch.cat([given, given[-1:].expand(max(0, rows - len(given)), -1)]).tolist()

    def tokens_a_picture(self, tokens: int) -> int:
        """Visual tokens of one picture."""
        return tokens // self.inputs["cross_attention_mask"].shape[2]

    def choose(
        self,
        layer: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        past: torch.Tensor,
        held: list[Entry],
        arriving: list[int],
        turn: Turn,
        reads: list[list[bool]],
        text: list[bool],
        states: torch.Tensor,
    ) -> list[Entry]:
        """The entries that a turn's pictures become."""
        voters = [row for row in range(turn.start, turn.end) if text[row] and any(reads[row])]
        if not voters or self.rule is None:
            return [Entry(token, [token]) for token in arriving]
        votes = {
            row: self.vote(
                layer, queries[row], keys[arriving], past, held, [reads[row][t] for t in arriving], reads[row]
            )
            for row in voters
        }
        groups: dict[tuple[bool, ...], list[int]] = {}
        for token in arriving:
            groups.setdefault(tuple(reads[row][token] for row in voters), []).append(token)
        made = []
        for pattern, members in groups.items():
            readers = [row for row, may in zip(voters, pattern, strict=True) if may]
            if not readers:
                continue
            mean = sum(votes[row] for row in readers) / len(readers)
            kept = sorted(self.rule(mean[:, [token - arriving[0] for token in members]], members, states))
            joined: dict[int, list[int]] = {token: [token] for token in kept}
            if self.merge:
                unit = torch.nn.functional.normalize(keys.flatten(1).double(), dim=-1)
                for token in members:
                    if token not in joined:
                        alike = unit[kept] @ unit[token]
                        joined[kept[int(alike.argmax())]].append(token)
            made += [Entry(token, sorted(own)) for token, own in joined.items()]
        return sorted(made, key=lambda entry: entry.token)

    def vote(
        self,
        layer: Any,
        query: torch.Tensor,
        keys: torch.Tensor,
        past: torch.Tensor,
        held: list[Entry],
        may: list[bool],
        reads: list[bool],
    ) -> torch.Tensor:
        """A row's attention to the arriving tokens, (heads, tokens); what it reads of earlier pictures takes its part."""
        every = torch.cat([keys, past])
        logits = torch.einsum("hd,thd->ht", query, every.repeat_interleave(layer.num_heads // every.shape[1], 1))
        bias = [0.0 if reading else -math.inf for reading in may]
        bias += [math.log(len(entry.members)) if reads[entry.token] else -math.inf for entry in held]
        return (logits * layer.scaling + torch.tensor(bias)).softmax(dim=-1)[:, : len(keys)]


def averages(tensor: torch.Tensor, entries: list[Entry]) -> torch.Tensor:
    """The mean over every entry's members of (tokens, ...)."""
    means = [tensor[entry.members].double().mean(dim=0).to(tensor.dtype) for entry in entries]
    return torch.stack(means) if means else tensor[:0]
