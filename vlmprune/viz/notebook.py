# SPDX-License-Identifier: Apache-2.0
"""How objects show themselves in a notebook: plain HTML, a picture with a caption or a table of facts."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def figure(image: Image.Image, caption: str) -> str:
    """A picture with a line of text below it."""
    data = b64encode(png(image)).decode()
    # in the page itself: a notebook that is sent on keeps its pictures
    shown = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}" style="max-width: 100%">'
    return f"<figure>{shown}<figcaption><code>{escape(caption)}</code></figcaption></figure>"


def facts(title: str, rows: Mapping[str, object]) -> str:
    """A table of two columns below a title; ``names`` in double backticks become code."""
    left = 'style="text-align: left"'
    cells = "".join(
        f"<tr><th {left}>{escape(name)}</th><td {left}>{_text(rows[name])}</td></tr>" for name in rows
    )
    return f"<table><caption {left}><code>{escape(title)}</code></caption>{cells}</table>"


def _text(value: object) -> str:
    return re.sub("``(.+?)``", r"<code>\1</code>", escape(str(value)))
