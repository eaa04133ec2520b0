"""Write the reproductions of upstream.md as files that run alone: `python docs/make_reproductions.py`.

A file begins with its section's text, goes on with the page's first block, which makes a model and its inputs, and ends with the
section's own block. The page is the source.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

DOCS = Path(__file__).parent
PAGE, FOLDER = DOCS / "upstream.md", DOCS / "upstream"
CODE = re.compile(r"^```python\n(.*?)^```\n?", flags=re.M | re.S)


def reproductions(page: str) -> dict[str, str]:
    """What every file holds, by its name.

    Example:
        >>> page = "# Faults\\n```python\\nx = 1\\n```\\n## It is two\\nIt should not.\\n```python\\nassert x == 2\\n```\\n"
        >>> print(reproductions(page)["it-is-two.py"])
        # It is two
        #
        # It should not.
        <BLANKLINE>
        x = 1
        <BLANKLINE>
        assert x == 2
        <BLANKLINE>
    """
    first, *sections = re.split(r"^## ", page, flags=re.M)
    (setup,) = CODE.findall(first)
    found = {}
    for section in sections:
        title, text = section.split("\n", 1)
        (code,) = CODE.findall(section)
        words = [textwrap.fill(part, 100) for part in (title, CODE.sub("", text).strip())]
        comment = "\n".join(f"# {line}".rstrip() for line in "\n\n".join(words).splitlines())
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        found[f"{name}.py"] = f"{comment}\n\n{setup}\n{code}"
    return found


def main() -> None:
    """Write all of them, and remove what no section describes any more."""
    FOLDER.mkdir(exist_ok=True)
    written = reproductions(PAGE.read_text(encoding="utf-8"))
    for old in FOLDER.glob("*.py"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
