# SPDX-License-Identifier: Apache-2.0
"""Notebooks as pages of the site: their text, their code, and what their cells showed."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from html import escape
from pathlib import Path
from typing import Any

PICTURE = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)")


class Page:
    """A notebook as Markdown, and its pictures as files in the folder of its page.

    Args:
        name: of the notebook, without its ending.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.parts: list[str] = []  # paragraphs of Markdown
        self.pictures: dict[str, bytes] = {}

    @property
    def text(self) -> str:
        return "\n\n".join(self.parts) + "\n"

    def picture(self, data: str) -> str:
        """Keeps a picture, given in base64; its address on the page."""
        name = f"{len(self.pictures)}.png"
        self.pictures[name] = b64decode(data)
        return name

    def add(self, cell: Any) -> None:
        """A cell, and below code what it showed."""
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            self.parts.append(source)
            return
        self.parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            self.parts.append(self.shown(output))

    def shown(self, output: Any) -> str:
        """One output, in the richest form that a page can show."""
        if output["output_type"] == "stream":
            return framed(f"<pre>{escape(joined(output['text']))}</pre>")
        data = output["data"]
        if "text/html" in data:
            html = joined(data["text/html"])
            return framed(PICTURE.sub(lambda found: self.picture(found[1]), html))
        if "text/markdown" in data:
            return joined(data["text/markdown"])
        if "image/png" in data:
            return framed(f'<img alt="what the cell drew" src="{self.picture(joined(data["image/png"]))}">')
        return framed(f"<pre>{escape(joined(data['text/plain']))}</pre>")


def page_of(path: Path) -> Page:
    """The page of a notebook that was executed."""
    made = Page(path.stem)
    first, *others = json.loads(path.read_text(encoding="utf-8"))["cells"]
    made.add(first)
    # as HTML: a link in Markdown would lead to the page
    made.parts.append(f'<p><a href="../{path.name}" download>Download this notebook</a></p>')
    for cell in others:
        made.add(cell)
    return made


def framed(html: str) -> str:
    """A block that Markdown leaves as it is: it would end at an empty line."""
    text = re.sub(r"\n\s*\n", "\n", html.strip())
    return f'<div class="output">{text}</div>'


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)
