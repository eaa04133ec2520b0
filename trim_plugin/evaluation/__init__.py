"""Stock beside trimmed on a user's own pictures and questions: reading them, answering, remembering, summing up.

`trim-plugin eval` is this package with a command line. What needs torch is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trim_plugin.evaluation.log import Answer, AnswerLog
from trim_plugin.evaluation.questions import QUESTIONS, Question, read_questions
from trim_plugin.evaluation.summary import MATCHES, Summary, lacks, silent, summarize, whole_variants
from trim_plugin.variants import Variant, variants_for

if TYPE_CHECKING:
    from trim_plugin.evaluation.page import Shown, report_html
    from trim_plugin.evaluation.run import evaluate

__all__ = [
    "MATCHES",
    "QUESTIONS",
    "Answer",
    "AnswerLog",
    "Question",
    "Shown",
    "Summary",
    "Variant",
    "evaluate",
    "lacks",
    "read_questions",
    "report_html",
    "silent",
    "summarize",
    "variants_for",
    "whole_variants",
]

_NEED_TORCH = {"evaluate": "run", "Shown": "page", "report_html": "page"}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
