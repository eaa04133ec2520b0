"""Stock beside trimmed on a user's own pictures and questions: reading them, answering, remembering, summing up.

`trim-plugin eval` is this package with a command line. As in `trim_plugin` itself, what needs torch is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trim_plugin.evaluation.log import Answer, AnswerLog
    from trim_plugin.evaluation.page import Shown, report_html
    from trim_plugin.evaluation.questions import QUESTIONS, Question, read_questions
    from trim_plugin.evaluation.run import evaluate
    from trim_plugin.evaluation.summary import MATCHES, Summary, lacks, silent, summarize, whole_variants
    from trim_plugin.variants import Variant, variants_for

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

#: The module of every public name.
_MODULES = {
    **dict.fromkeys(("Answer", "AnswerLog"), "evaluation.log"),
    **dict.fromkeys(("Shown", "report_html"), "evaluation.page"),
    **dict.fromkeys(("QUESTIONS", "Question", "read_questions"), "evaluation.questions"),
    "evaluate": "evaluation.run",
    **dict.fromkeys(("MATCHES", "Summary", "lacks", "silent", "summarize", "whole_variants"), "evaluation.summary"),
    **dict.fromkeys(("Variant", "variants_for"), "variants"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"trim_plugin.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
