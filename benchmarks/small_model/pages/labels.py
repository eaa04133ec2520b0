"""What every patch of a page shows, for the vision tower to learn: a picture gives a thousand examples instead of forty.

Four aspects a patch, 0 where there is none: its glyph (ten digits, eight words), its place in its number (first of one,
first of two, and so on), its line counted from the top, and the word that its line begins with. The last three are what a
reader has to bind together.
"""

from __future__ import annotations

from benchmarks.small_model.pages.scenes import LABELS, Box, Page

ASPECTS = {"patches": 1 + 10 + len(LABELS), "places": 1 + 6, "lines": 1 + 8, "words of line": 1 + len(LABELS)}
"""How many classes every aspect has, the class 0 for "none" included."""

_FIRST_PLACE = {1: 1, 2: 2, 3: 4}


def marks(page: Page) -> list[tuple[Box, tuple[int, int, int, int]]]:
    """The boxes of a page, and the classes of the patches in them.

    Example:
        >>> from benchmarks.small_model.pages.scenes import draw_page
        >>> page = draw_page(3, held_out=True, layout=(1, 2), lines=1)
        >>> (page.lines[0].label, page.lines[0].number), [classes for _, classes in marks(page)]
        (('orange', '4'), [(12, 0, 1, 2), (5, 1, 1, 2)])
    """
    found: list[tuple[Box, tuple[int, int, int, int]]] = []
    for row, line in enumerate(page.lines, start=1):
        word = 1 + LABELS.index(line.label)
        found.append((line.label_box, (10 + word, 0, row, word)))
        for index, (digit, box) in enumerate(zip(line.number, line.digit_boxes, strict=True)):
            found.append((box, (1 + int(digit), _FIRST_PLACE[len(line.number)] + index, row, word)))
    return found


__all__ = ["ASPECTS", "marks"]
