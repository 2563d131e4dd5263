# SPDX-License-Identifier: Apache-2.0
"""A page in the browser where methods answer one question side by side: ``vlmprune demo``.

``playground.py`` asks the model and knows no browser, ``cards.py`` turns answers into HTML, ``page.py`` is
the only file that knows Gradio.
"""
