"""The next token of every running request, by its own settings, and the text that its tokens make."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trim_plugin.engine.request import Sampling


class Drawer:
    """One request's choices: its settings, and a generator of its own, so that its text does not depend on its company.

    Args:
        sampling: the settings.
        prompt: ids of the prompt's tokens, which a repetition penalty reads.
        seed: what it draws with; None is the settings', or any.

    Example:
        >>> drawer = Drawer(Sampling(), [1])
        >>> choose([drawer], torch.tensor([[0.1, 0.7, 0.2]])), drawer.tokens
        ([1], [1])
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], seed: int | None = None) -> None:
        self.sampling, self.prompt = sampling, list(prompt)
        self.tokens: list[int] = []
        self.generator = torch.Generator()  # on the CPU: the same draw on every device
        seed = sampling.seed if seed is None else seed
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def penalized(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (1, vocabulary) after the penalties on what has been written."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            ids = torch.tensor([self.prompt + self.tokens], device=logits.device)
            # An image token has an id but no logit.
            ids = ids[:, ids[0] < logits.shape[1]]
            logits = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))(ids, logits)
        if self.tokens and (sampling.presence_penalty or sampling.frequency_penalty):
            counts = torch.bincount(torch.tensor(self.tokens, device="cpu"), minlength=logits.shape[1]).to(logits)
            logits = logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
        return logits

    def draw(self, probabilities: torch.Tensor) -> int:
        """A token drawn from probabilities (vocabulary,), on the CPU."""
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


def choose(drawers: Sequence[Drawer], logits: torch.Tensor) -> list[int | BaseException]:
    """The next token of each, which is added to its own; or why there is none. Rows with equal settings are worked on together.

    Args:
        drawers: of the requests that run.
        logits: (requests, vocabulary).
    """
    try:
        tokens = _chosen(drawers, logits)
    except BaseException as error:  # noqa: BLE001 - whose failure it is shows when each chooses alone
        if len(drawers) == 1:
            return [error]
        return [choose([drawer], logits[row : row + 1])[0] for row, drawer in enumerate(drawers)]
    return [_drawn(drawer, token) for drawer, token in zip(drawers, tokens, strict=True)]


def _drawn(drawer: Drawer, token: int | torch.Tensor) -> int | BaseException:
    """The token, drawn if there are probabilities."""
    try:
        found = token if isinstance(token, int) else drawer.draw(token)
    except BaseException as error:  # noqa: BLE001 - logits that are no numbers are one request's failure
        return error
    drawer.tokens.append(found)
    return found


def _chosen(drawers: Sequence[Drawer], logits: torch.Tensor) -> list[int | torch.Tensor]:
    """For each the likeliest token, or probabilities (vocabulary,) to draw from, on the CPU. Nothing is drawn yet."""
    logits = logits.float()
    if any(drawer.sampling.penalizes for drawer in drawers):
        rows = [
            drawer.penalized(logits[row : row + 1]) if drawer.sampling.penalizes else logits[row : row + 1]
            for row, drawer in enumerate(drawers)
        ]
        logits = torch.cat(rows)
    likeliest = logits.argmax(dim=-1)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row, drawer in enumerate(drawers):
        if not drawer.sampling.greedy:
            own = drawer.sampling
            groups.setdefault((own.temperature, own.top_k, own.top_p, own.min_p), []).append(row)
    tokens: list[int | torch.Tensor] = likeliest.tolist()  # one look at the device for all
    for settings, members in groups.items():
        warped = warpers(*settings)(None, logits[members])
        probabilities = warped.softmax(dim=-1).cpu()
        for row, own in zip(members, probabilities, strict=True):
            tokens[row] = own
    return tokens


def warpers(temperature: float, top_k: int | None, top_p: float, min_p: float | None) -> LogitsProcessorList:
    """transformers' own, in its order."""
    chain = LogitsProcessorList()
    if temperature != 1:
        chain.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(float(top_p)))
    if min_p:
        chain.append(MinPLogitsWarper(float(min_p)))
    return chain


@dataclasses.dataclass
class Writer:
    """Tokens to text, as they come: nothing is sent that a later token could change, and nothing of a stop text.

    Args:
        tokenizer: the processor's.
        stop: texts before which the answer ends.

    Example:
        >>> from trim_plugin.embedded import load_small_model
        >>> _, processor = load_small_model()
        >>> ids = processor.tokenizer("red blue", add_special_tokens=False)["input_ids"]
        >>> writer = Writer(processor.tokenizer, ("blue",))
        >>> [writer.add(token) for token in ids], writer.stopped
        (['red', ' '], True)
    """

    tokenizer: Any
    stop: tuple[str, ...] = ()
    stopped: bool = False
    text: str = ""
    _tokens: list[int] = dataclasses.field(default_factory=list)
    _from: int = 0
    _read: int = 0
    _held_back: str = ""

    def add(self, token: int) -> str:
        """What may be sent after this token."""
        self._tokens.append(token)
        before = self._decoded(self._from, self._read)
        now = self._decoded(self._from, len(self._tokens))
        if now.endswith("�"):  # a character whose bytes are not complete
            return ""
        if now == before:  # a token without text
            return ""
        self._from, self._read = self._read, len(self._tokens)
        return self._pass(now[len(before) :])

    def end(self) -> str:
        """What is still to be sent when no token follows."""
        before, now = self._decoded(self._from, self._read), self._decoded(self._from, len(self._tokens))
        rest = self._pass(now[len(before) :]) if not self.stopped else ""
        if not self.stopped:
            rest += self._held_back
            self.text += self._held_back
            self._held_back = ""
        return rest

    def _decoded(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self._tokens[start:end], skip_special_tokens=True))

    def _pass(self, new: str) -> str:
        waiting = self._held_back + new
        ends = [place for place in (waiting.find(text) for text in self.stop) if place >= 0]
        if ends:
            self.stopped, self._held_back, sent = True, "", waiting[: min(ends)]
        else:
            keep = max((_begun(waiting, text) for text in self.stop), default=0)
            sent, self._held_back = waiting[: len(waiting) - keep], waiting[len(waiting) - keep :]
        self.text += sent
        return sent


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text could be the beginning of a stop text.

    Example:
        >>> _begun("the en", "end"), _begun("the", "end")
        (2, 1)
    """
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
