"""The way of one call: how many files a reader of it opens, and that the architecture page names each of them."""

from __future__ import annotations

import sys
from pathlib import Path

import trim_plugin
from trim_plugin.embedded import ask, load_small_model

PACKAGE = Path(trim_plugin.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "call-flow.md"
FILES, CHANGES = 15, 120


def entered() -> list[str]:
    """The package's files that a default call runs functions of, each time that it changes from one to another.

    The model has answered before: nothing is imported, attached or filled for the first time.
    """
    model, processor = load_small_model()
    inputs, found = ask(processor), []

    def answer():
        model.generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation="trimmed")

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            name = path.relative_to(PACKAGE).as_posix()
            if not found or found[-1] != name:
                found.append(name)

    answer()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        answer()
    finally:
        sys.setprofile(before)
    return found


def test_a_default_call_is_read_in_few_files_which_the_page_names():
    found = entered()
    assert len(set(found)) <= FILES, sorted(set(found))
    assert len(found) <= CHANGES
    way = PAGE.read_text(encoding="utf-8").split("## The way of one call")[1].split("```")[1]
    assert [name for name in sorted(set(found)) if name not in way] == []
