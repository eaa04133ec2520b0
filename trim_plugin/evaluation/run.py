"""Answering questions with several variants: stock and trimmed caches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

from trim_plugin.engine.engine import MAX_RUNNING, can_run
from trim_plugin.engine.ignored import ignored
from trim_plugin.evaluation.alone import answers_alone
from trim_plugin.evaluation.log import Answer, AnswerLog
from trim_plugin.evaluation.questions import Question
from trim_plugin.evaluation.together import answers_together
from trim_plugin.variants import Variant


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    variants: Sequence[Variant],
    log: AnswerLog,
    *,
    max_new_tokens: int = 64,
    max_running: int = MAX_RUNNING,
    memory: int | None = None,
    process: int = 0,
    processes: int = 1,
    on_answer: Callable[[Answer], None] | None = None,
) -> None:
    """Answer greedily what the log doesn't hold yet, and log every answer as it comes.

    Trimmed variants answer many questions at once, one variant after the other (`Engine`); what each answers is what it would
    alone. Transformers' own cache, and a variant that no engine can have, answer one at a time; so does every variant where the
    model's `generation_config` asks for what no engine does (`engine.ignored`). So the seconds and peaks of the two kinds are not
    to be compared, and `Answer.at_once` says which is which: `max_running=1` answers all questions one at a time, each read
    anew, for times and memory that are.

    A question that cannot be answered (a picture that cannot be read, a chat that does not fit the model, too little memory)
    has its error logged; the others are answered. A trimmed variant of which many questions in a row fail alike is given up, its
    other questions with the same error, and the next variant has its turn.

    Args:
        model: an Mllama model, on its device. Nobody else may use it meanwhile.
        processor: its processor.
        questions: all questions; this process takes every `processes`-th.
        variants: how to answer each.
        log: where answers go.
        max_new_tokens: longest answer of questions that don't say.
        max_running: questions that are answered at once; 1 answers each alone.
        memory: bytes that their keys and values may take, as for `Engine`.
        process: which process this is, 0 … processes − 1.
        processes: how many share the questions.
        on_answer: called after every answer, for progress.

    Raises:
        ValueError: `max_running` or `memory` is no positive integer.
        torch.AcceleratorError: the device is lost.
        OSError: a disk is full, or gone.
        EngineClosed: an engine's thread has died.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from trim_plugin.embedded import examples, load_small_model
        >>> from trim_plugin.variants import variants_for
        >>> asked = [Question(str(n), (own.picture,), own.question) for n, own in enumerate(examples()[:2])]
        >>> log = AnswerLog(Path(tempfile.mkdtemp()), {})
        >>> evaluate(*load_small_model(), asked, variants_for([1.0]), log, max_new_tokens=4)
        >>> [(answer.way, answer.at_once) for answer in log.answers()]
        [('stock', 1), ('stock', 1), ('exact', 32), ('exact', 32)]
    """
    for name, value in (("max_running", max_running), ("memory", memory)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    share = questions[process::processes]
    done = {(answer.question, answer.way) for answer in log.answers() if not answer.error}

    def is_done(question: Question, variant: Variant) -> bool:
        return (question.name, variant.name) in done

    def answers() -> Generator[Answer, None, None]:
        together = max_running > 1 and not ignored(model.generation_config)
        many = [variant for variant in variants if together and variant.config and can_run(variant.config)]
        alone = [variant for variant in variants if variant not in many]
        yield from answers_alone(model, processor, share, alone, max_new_tokens=max_new_tokens, is_done=is_done)
        for variant in many:
            missing = [question for question in share if not is_done(question, variant)]
            if missing:
                yield from answers_together(
                    model,
                    processor,
                    missing,
                    variant,
                    max_new_tokens=max_new_tokens,
                    max_running=max_running,
                    memory=memory,
                )

    with contextlib.closing(answers()) as found:  # whatever happens, no engine is left behind
        for answer in found:
            log.add(answer)
            if on_answer is not None:
                on_answer(answer)
