"""Stock beside trimmed on a user's own pictures and questions: reading them, answering, remembering, summing up.

`trim-plugin eval` is this module with a command line. Answers are appended to JSON Lines files as they come, one for each
process, so that an interrupted run goes on where it was, and several processes share the work without talking to each other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trim_plugin.config import TrimConfig
from trim_plugin.prompting import build_inputs, open_picture

QUESTIONS = "questions.jsonl"
MATCHES = ("exact", "contains")


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of a questions file.

    Args:
        name: what the answers are filed under; unique.
        pictures: picture files, all read by the question.
        text: the question.
        answers: what counts as right; empty if that is not known.
    """

    name: str
    pictures: tuple[Path, ...]
    text: str
    answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to answer: stock (`config` is None) or a trimmed cache."""

    name: str
    config: TrimConfig | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one generation gave.

    Args:
        question: name of the question.
        way: name of the way.
        text: the answer.
        seconds: wall-clock time of `generate`, vision tower and prefill included.
        new_tokens: generated text tokens.
        visible_tokens: visual tokens that the text may read; 0 for stock, which does not count them.
        kept_tokens: visual tokens that decoding could read; 0 for stock.
        cross_kv_bytes: bytes of the cached visual keys and values; for stock see `stock_cross_kv_bytes` of the others.
        stock_cross_kv_bytes: bytes that transformers' own cache would hold.
        peak_bytes: most memory allocated on the GPU during `generate`, weights included; 0 without a GPU.
    """

    question: str
    way: str
    text: str
    seconds: float
    new_tokens: int
    visible_tokens: int = 0
    kept_tokens: int = 0
    cross_kv_bytes: int = 0
    stock_cross_kv_bytes: int = 0
    peak_bytes: int = 0


def read_questions(folder: Path, file: Path | None = None) -> list[Question]:
    """Read a questions file: JSON Lines with "picture" (or "pictures"), "question", and perhaps "answer" and "id".

    Pictures are named relative to `folder`; "answer" is a text or a list of texts that all count as right.

    Args:
        folder: where the pictures are.
        file: the questions; `questions.jsonl` in the folder by default.

    Raises:
        FileNotFoundError: no such file, or a picture is missing.
        ValueError: a line is not what is asked for; the message names it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "questions.jsonl").write_text('{"picture": "a.png", "question": "How many?"}')
        >>> read_questions(folder)
        Traceback (most recent call last):
        ...
        FileNotFoundError: questions.jsonl, line 1: no such picture: a.png
    """
    file = folder / QUESTIONS if file is None else file
    if not file.is_file():
        raise FileNotFoundError(f"no questions: {file} does not exist")
    questions: list[Question] = []
    names: set[str] = set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        question = _question(line, folder, where, str(number))
        if question.name in names:
            raise ValueError(f"{where}: the id {question.name!r} occurs twice")
        names.add(question.name)
        questions.append(question)
    if not questions:
        raise ValueError(f"no questions: {file} is empty")
    return questions


def _question(line: str, folder: Path, where: str, name: str) -> Question:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object like {{'picture': 'a.png', 'question': 'How many?'}}")
    unknown = sorted(set(entry) - {"id", "picture", "pictures", "question", "answer"})
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}. Allowed: id, picture, pictures, question, answer")
    if ("picture" in entry) == ("pictures" in entry):
        raise ValueError(f"{where}: give either 'picture' or 'pictures'")
    given = _texts(entry.get("pictures", entry.get("picture")), f"{where}: 'picture'")
    text = _texts(entry.get("question"), f"{where}: 'question'")
    if len(text) != 1 or not text[0].strip():
        raise ValueError(f"{where}: 'question' must be a text")
    pictures = tuple(folder / picture for picture in given)
    for picture, as_given in zip(pictures, given, strict=True):
        if not picture.is_file():
            raise FileNotFoundError(f"{where}: no such picture: {as_given}")
    answers = () if entry.get("answer") is None else _texts(entry["answer"], f"{where}: 'answer'")
    return Question(str(entry.get("id", name)), pictures, text[0], answers)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(entry, str) for entry in values):
        raise ValueError(f"{name} must be a text or a list of texts, got {value!r}")
    return tuple(values)


def ways_for(
    ratios: Sequence[float], kv_quantization: str | None = None, *, scope: str = "prefill", stock: bool = True
) -> list[Way]:
    """Stock, then a trimmed cache for each ratio; 1.0 is exact mode. The other arguments are `TrimConfig`'s.

    Example:
        >>> [way.name for way in ways_for([1.0, 0.25], "int8")]
        ['stock', 'exact, int8', '0.25, int8']
    """
    extras = [*([] if scope == "prefill" else [scope]), *([] if kv_quantization is None else [kv_quantization])]
    ways = [Way("stock", None)] if stock else []
    for ratio in ratios:
        name = "exact" if ratio == 1.0 else f"{ratio:g}"
        config = TrimConfig(top_k_ratio=ratio, kv_quantization=kv_quantization, scope=scope)
        ways.append(Way(", ".join([name, *extras]), config))
    return ways


class AnswerLog:
    """The answers so far, in `answers-*.jsonl` of a folder; each process appends to a file of its own.

    A line that an interruption cut short is dropped, and its question is answered again.

    Args:
        folder: made if need be.
        settings: what the answers depend on; a folder with answers of other settings is refused.
        process: which of the processes this is.

    Raises:
        ValueError: the folder holds answers that were made with other settings.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> AnswerLog(folder, {"model": "small"}).add(Answer("1", "stock", "seven", 0.5, 2))
        >>> [answer.text for answer in AnswerLog(folder, {"model": "small"}).answers()]
        ['seven']
        >>> AnswerLog(folder, {"model": "large"})
        Traceback (most recent call last):
        ...
        ValueError: ... holds answers of another run (model was 'small', now 'large'). Give another folder...
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], process: int = 0) -> None:
        self.folder = folder
        self._file = folder / f"answers-{process}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._check_settings(dict(settings))
        if self._file.is_file():
            kept = list(_whole_lines(self._file))
            write_whole(self._file, "".join(f"{line}\n" for line in kept))

    def _check_settings(self, settings: dict[str, Any]) -> None:
        file = self.folder / "settings.json"
        if not file.is_file():
            write_whole(file, json.dumps(settings, indent=2) + "\n")
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        for name in sorted(set(before) | set(settings)):
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.folder} holds answers of another run ({name} was {before.get(name)!r}, now "
                    f"{settings.get(name)!r}). Give another folder, or remove this one."
                )

    def add(self, answer: Answer) -> None:
        """Append an answer; it is on disk when this returns."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(answer)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def answers(self) -> list[Answer]:
        """The answers of all processes, one for each question and way."""
        found: dict[tuple[str, str], Answer] = {}
        for file in sorted(self.folder.glob("answers-*.jsonl")):
            for line in _whole_lines(file):
                answer = Answer(**json.loads(line))
                found.setdefault((answer.question, answer.way), answer)
        return list(found.values())


def _whole_lines(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            json.loads(line)
        except json.JSONDecodeError:
            continue
        yield line


def write_whole(file: Path, text: str) -> None:
    """Write a file so that no other process ever sees half of it.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.txt"
        >>> write_whole(file, "all")
        >>> file.read_text()
        'all'
    """
    draft = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    ways: Sequence[Way],
    log: AnswerLog,
    *,
    max_new_tokens: int = 64,
    process: int = 0,
    processes: int = 1,
    on_answer: Callable[[Answer], None] | None = None,
) -> None:
    """Answer what the log doesn't hold yet, greedily, one question at a time, and log every answer.

    Args:
        model: an Mllama model, on its device.
        processor: its processor.
        questions: all questions; this process takes every `processes`-th.
        ways: how to answer each.
        log: where answers go.
        max_new_tokens: longest answer.
        process: which process this is, 0 … processes − 1.
        processes: how many share the questions.
        on_answer: called after every answer, for progress.

    Raises:
        FileNotFoundError, ValueError: a picture cannot be read.
    """
    done = {(answer.question, answer.way) for answer in log.answers()}
    device = next(model.parameters()).device
    warm: set[str] = set()
    for question in questions[process::processes]:
        missing = [way for way in ways if (question.name, way.name) not in done]
        if not missing:
            continue
        pictures = [open_picture(picture) for picture in question.pictures]
        inputs = build_inputs(processor, question.text, pictures, device)
        for way in missing:
            if way.name not in warm:  # the first generation pays for allocations and kernels: not timed
                _generate(model, processor, inputs, question, way, max_new_tokens)
                warm.add(way.name)
            answer = _generate(model, processor, inputs, question, way, max_new_tokens)
            log.add(answer)
            if on_answer is not None:
                on_answer(answer)


def _generate(
    model: Any, processor: Any, inputs: dict[str, torch.Tensor], question: Question, way: Way, max_new_tokens: int
) -> Answer:
    settings = {} if way.config is None else {"cache_implementation": "trimmed", "cache_config": way.config}
    on_gpu = inputs["input_ids"].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, **settings
    )
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    answer = Answer(
        question=question.name,
        way=way.name,
        text=processor.decode(new, skip_special_tokens=True).strip(),
        seconds=seconds,
        new_tokens=len(new),
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
    )
    if way.config is None:
        return answer
    report = output.past_key_values.report()
    return dataclasses.replace(
        answer,
        visible_tokens=report.visible_tokens[0],
        kept_tokens=report.kept_tokens[0],
        cross_kv_bytes=report.cross_kv_bytes,
        stock_cross_kv_bytes=report.stock_cross_kv_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Summary:
    """One way over all questions; means, and None for what cannot be known.

    Args:
        way: its name.
        questions: answered questions.
        accuracy: share of right answers among the questions whose answer is given.
        agreement: share of answers that are the same as the first way's, case, spaces and final punctuation aside.
        overlap: mean F1 of the words shared with the first way's answer, which suits long answers.
        kept_share: kept visual tokens over visible ones.
        cross_kv_ratio: bytes of cached visual keys and values over stock's.
        seconds: per question.
        peak_bytes: most memory on the GPU, over all questions.
    """

    way: str
    questions: int
    accuracy: float | None
    agreement: float
    overlap: float
    kept_share: float | None
    cross_kv_ratio: float | None
    seconds: float
    peak_bytes: int | None


def summarize(
    questions: Sequence[Question], ways: Sequence[Way], answers: Sequence[Answer], match: str = "exact"
) -> list[Summary]:
    """Sum up every way over the questions that all ways have answered; agreement is with the first way.

    Args:
        questions: as read.
        ways: as run.
        answers: from the log.
        match: "exact": an answer is right if it equals a given one; "contains": if a given one occurs in it as whole words.
            Both leave case, spaces and final punctuation aside.

    Raises:
        ValueError: another `match`.

    Example:
        >>> question = Question("1", (), "Which digit is red?", ("seven",))
        >>> given = [Answer("1", "stock", "Seven.", 0.1, 2), Answer("1", "0.25", "nine", 0.1, 2, 65, 13, 20, 80)]
        >>> for row in summarize([question], ways_for([0.25]), given):
        ...     print(row.way, row.accuracy, row.agreement, row.kept_share)
        stock 1.0 1.0 None
        0.25 0.0 0.0 0.2
    """
    if match not in MATCHES:
        raise ValueError(f"match must be one of {', '.join(map(repr, MATCHES))}, got {match!r}.")
    found = {(answer.question, answer.way): answer for answer in answers}
    whole = [question for question in questions if all((question.name, way.name) in found for way in ways)]
    if not whole:
        return []
    first = [found[question.name, ways[0].name] for question in whole]
    return [_summary(way, whole, [found[question.name, way.name] for question in whole], first, match) for way in ways]


def _summary(way: Way, questions: list[Question], answers: list[Answer], first: list[Answer], match: str) -> Summary:
    known = [(q, a) for q, a in zip(questions, answers, strict=True) if q.answers]
    pairs = [(a.text, b.text) for a, b in zip(answers, first, strict=True)]
    visible, stock = sum(a.visible_tokens for a in answers), sum(a.stock_cross_kv_bytes for a in answers)
    return Summary(
        way=way.name,
        questions=len(answers),
        accuracy=_mean([is_right(a.text, q.answers, match) for q, a in known]) if known else None,
        agreement=_mean([normalized(text) == normalized(other) for text, other in pairs]),
        overlap=_mean([word_overlap(text, other) for text, other in pairs]),
        kept_share=sum(a.kept_tokens for a in answers) / visible if visible else None,
        cross_kv_ratio=sum(a.cross_kv_bytes for a in answers) / stock if stock else None,
        seconds=_mean([a.seconds for a in answers]),
        peak_bytes=max(a.peak_bytes for a in answers) or None,
    )


def normalized(text: str) -> str:
    """Lower case, single spaces, no punctuation at the end.

    Example:
        >>> normalized(" Red  seven, blue two. ")
        'red seven, blue two'
    """
    return " ".join(text.casefold().split()).rstrip(".!?,;: ")


def is_right(text: str, answers: Sequence[str], match: str = "exact") -> bool:
    """Whether an answer is one of those that count as right.

    Example:
        >>> is_right("It is seven.", ["seven"]), is_right("It is seven.", ["seven"], "contains")
        (False, True)
    """
    given = normalized(text)
    if match == "exact":
        return any(given == normalized(answer) for answer in answers)
    return any(re.search(rf"(?<!\w){re.escape(normalized(answer))}(?!\w)", given) is not None for answer in answers)


def word_overlap(text: str, other: str) -> float:
    """F1 of the words that two texts share, counted with repetition; 1.0 if both are empty.

    Example:
        >>> word_overlap("red seven, blue two", "red seven, blue nine")
        0.75
    """
    own, others = (Counter(re.findall(r"\w+", part.casefold())) for part in (text, other))
    if not own and not others:
        return 1.0
    return 2 * (own & others).total() / (own.total() + others.total())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
