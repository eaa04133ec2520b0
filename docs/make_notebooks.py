"""Write the tutorials as notebooks: `python docs/make_notebooks.py`.

A page and its notebook have one source, the page. Python blocks become cells of code; all else, other languages' blocks included,
becomes cells of text. Behind the cell that names the model stands one for the real model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
TUTORIALS, NOTEBOOKS = DOCS / "tutorials", DOCS / "notebooks"
#: What stands on every tutorial's first line of text, and has no use in the notebook itself.
LINK = "[As a notebook](../notebooks/{name}.ipynb){{ download }}"
REAL = """# The real model: ask for access to its weights, log in (`hf auth login`), and take the # away.
# MODEL = "meta-llama/Llama-3.2-11B-Vision-Instruct"
"""
YOURS = """# PICTURE, QUESTION = "photo.jpg", "What is in this picture?"
"""


def cells(name: str, page: str) -> list[dict[str, Any]]:
    """The cells of a page.

    Example:
        >>> page = "# A title\\n\\nText.\\n\\n```python\\nMODEL = SMALL\\n```\\n\\n```bash\\nls\\n```\\n"
        >>> [cell["cell_type"] for cell in cells("page", page)]
        ['markdown', 'code', 'code', 'markdown']
    """
    page = page.replace(LINK.format(name=name) + "\n\n", "")
    found = []
    for number, part in enumerate(re.split(r"^```python\n(.*?)^```\n?", page, flags=re.M | re.S)):
        if number % 2:
            found.append(_cell("code", part))
            if re.search(r"^MODEL = ", part, flags=re.M):
                found.append(_cell("code", REAL + (YOURS if re.search(r"^PICTURE = ", part, flags=re.M) else "")))
        elif part.strip():
            # Pages beside this one are in another folder than the notebook.
            found.append(_cell("markdown", re.sub(r"\]\((?=[\w-]+\.md)", "](../tutorials/", part)))
    return [cell | {"id": f"{name}-{number}"[-64:]} for number, cell in enumerate(found)]


def _cell(kind: str, text: str) -> dict[str, Any]:
    own = {"outputs": [], "execution_count": None} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": text.strip("\n").splitlines(keepends=True), **own}


def notebook(page: Path) -> str:
    """The notebook of a page, as JSON."""
    content = {
        "cells": cells(page.stem, page.read_text(encoding="utf-8")),
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def made() -> dict[Path, str]:
    """File of every notebook → its text."""
    return {NOTEBOOKS / f"{page.stem}.ipynb": notebook(page) for page in sorted(TUTORIALS.glob("*.md"))}


def main() -> None:
    """Write all notebooks."""
    NOTEBOOKS.mkdir(exist_ok=True)
    for path, text in made().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
