"""Stock beside trimmed on a user's own pictures and questions: reading them, answering, remembering, summing up.

`trim-plugin eval` is this package with a command line.
"""

from trim_plugin.evaluation.log import Answer, AnswerLog
from trim_plugin.evaluation.page import Shown, report_html
from trim_plugin.evaluation.questions import QUESTIONS, Question, read_questions
from trim_plugin.evaluation.run import Way, evaluate, ways_for
from trim_plugin.evaluation.summary import MATCHES, Summary, summarize, whole_ways

__all__ = [
    "MATCHES",
    "QUESTIONS",
    "Answer",
    "AnswerLog",
    "Question",
    "Shown",
    "Summary",
    "Way",
    "evaluate",
    "read_questions",
    "report_html",
    "summarize",
    "ways_for",
    "whole_ways",
]
