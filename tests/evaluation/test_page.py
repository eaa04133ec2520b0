"""The report that a person looks at: whole in one file, differences first, nothing taken for markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trim_plugin.evaluation import Answer, Question, Shown, report_html, summarize, variants_for
from trim_plugin.evaluation.log import pack_kept, unpack_kept
from trim_plugin.pictures.visualize import TileMap

WAYS = variants_for([0.25])
TILE = TileMap(rows=1, columns=1, side=2, first=0)


def answers(name: str, stock: str, trimmed: str, kept=(0, 1), error: str = ""):
    yield Answer(name, "stock", stock, 0.1, 2, error=error)
    digits = pack_kept(kept, 20)
    yield Answer(name, "0.25", trimmed, 0.1, 2, 5, len(kept), 100, 400, kept=digits, error=error)


@pytest.fixture
def made():
    questions = [
        Question("same", (Path("a.png"),), "The same?", ("yes",)),
        Question("other", (Path("b.png"),), "<script>alert(1)</script> & 'more'?", ("one", "1")),
        Question("unread", (Path("c.png"),), "Which?"),
    ]
    given = [
        *answers("same", "Yes.", "yes"),
        *answers("other", "one", "<b>two</b>", kept=(0, 1, 2, 3, 4)),
        *answers("unread", "", "", error="not a picture: c.png"),
    ]
    asked = []

    def pictures(question):
        asked.append(question.name)
        return [Shown(Image.new("RGB", (40, 40), "navy"), TILE, 20)]

    text = report_html(questions, summarize(questions, WAYS, given), given, pictures)
    assert asked == ["same", "other"]
    return text


def test_every_error_is_shown_if_nothing_was_answered():
    questions = [Question("unread", (Path("c.png"),), "Which?")]
    given = list(answers("unread", "", "", error="not a picture: c.png"))
    assert summarize(questions, WAYS, given) == []
    text = report_html(questions, [], given, lambda question: pytest.fail("no picture can be shown"))
    assert text.count("<p class=error>not a picture: c.png</p>") == 2


class Reader(HTMLParser):
    """Checks that tags close in order and notes what is shown and fetched."""

    VOID = ("meta", "br", "img", "input", "link")

    def __init__(self):
        super().__init__()
        self.open, self.text, self.addresses, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def test_it_is_one_well_formed_file_that_fetches_nothing(made):
    reader = Reader()
    reader.feed(made)
    assert reader.open == []
    assert reader.addresses == []
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert re.findall(r"url\((?!data:image/)", made) == []
    assert re.findall(r"url\(data:image/(\w+);", made).count("jpeg") == 2  # a picture is in it once, whatever the ways
    assert "http" not in made


def test_differences_come_first_and_unread_ones_last(made):
    reader = Reader()
    reader.feed(made)
    shown = " ".join(reader.text)
    assert shown.index("alert(1)") < shown.index("The same?") < shown.index("Which?")
    assert "answers differ: 1; then those with the same answer: 1; last those that could not be answered: 1." in shown
    assert "not a picture: c.png" in shown
    assert made.count("class='card differs'") == 1


def test_what_users_and_models_write_is_text(made):
    reader = Reader()
    reader.feed(made)
    shown = " ".join(reader.text)
    assert "<script>alert(1)</script> & 'more'?" in shown
    assert "<b>two</b>" in shown


def test_right_and_wrong_are_marked(made):
    other = made[made.index("alert(1)") : made.index("The same?")]
    assert (other.count("class=yes"), other.count("class=no")) == (1, 1)
    assert "right: one / 1" in other


def test_what_was_kept_is_drawn_and_counted(made):
    same = made[made.index("The same?") :]
    assert "kept 2 of 5 visible tokens (40 %)" in same
    assert "1 of 4 patches kept" in same  # token 0 is the class token
    assert same.count("class=dropped") == 1
    other = made[made.index("alert(1)") : made.index("The same?")]
    assert "4 of 4 patches kept" in other
    assert "class=dropped" not in other


def test_kept_tokens_are_packed_and_unpacked():
    kept = np.random.default_rng(0).random(6404) < 0.3
    digits = pack_kept(kept.nonzero()[0].tolist(), 6404)
    assert len(digits) == 2 * ((6404 + 7) // 8)
    assert np.array_equal(unpack_kept(digits, 6404), kept)
