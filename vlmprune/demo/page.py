# SPDX-License-Identifier: Apache-2.0
"""The page itself, in Gradio: inputs on the left, one card for each spec on the right.

Everything that the page loads comes from this machine, and nothing is reported to anybody.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from ..errors import UnsupportedError, VlmPruneError
from ..models.loading import BUNDLED, BUNDLED_NOTE
from .cards import answered
from .playground import KEEP, METHODS, MOST_METHODS, Playground, example_samples, offered

WAITING = 32  # users that may wait for an answer; the next one is told to come back
LARGEST_UPLOAD = "20mb"
FIRST_WORDS = "Press Ask for the answers to this question, or click another question below the inputs."
AN_HOUR = 3600  # seconds after which uploaded pictures are deleted


def page(playground: Playground) -> Any:
    """The page as ``gradio.Blocks``, for ``launch`` here or in a program of yours."""
    gr = gradio()
    first = example_samples()[0]  # a page that is not empty when it opens
    with gr.Blocks(
        title="vlmprune", analytics_enabled=False, fill_width=True, delete_cache=(AN_HOUR, AN_HOUR)
    ) as made:
        gr.Markdown(_head(playground))
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                picture = _picture_input(gr, first.load_images()[0])
                question = gr.Textbox(first.question, label="question", lines=1, elem_id="question")
                keep = gr.Slider(
                    1, 100, value=100 * KEEP, step=0.5, label="keep, % of the visual tokens", elem_id="keep"
                )
                methods = gr.Dropdown(
                    offered(),
                    value=list(METHODS),
                    multiselect=True,
                    max_choices=MOST_METHODS,
                    allow_custom_value=True,
                    label="methods, or whole specs such as debias+fastv(layer=2)@0.25",
                    elem_id="methods",
                )
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3, min_width=320):
                answers = gr.HTML(f"<p>{FIRST_WORDS}</p>", elem_id="answers")
        # in the order of the arguments of ``answered`` behind the playground
        inputs = [picture, question, methods, keep]
        respond = partial(answered, playground)
        # one queue for all that calls the model, with a worker for each copy of it
        served = {"concurrency_limit": playground.copies, "concurrency_id": "model"}
        # whatever changes asks again; of several changes while an answer is made, the last one counts
        gr.on(
            [ask.click, question.submit, keep.release, methods.change],
            respond,
            inputs,
            answers,
            trigger_mode="always_last",
            api_name="compare",
            show_progress="minimal",
            **served,
        )
        examples = gr.Examples(
            [[sample.load_images()[0], sample.question] for sample in example_samples()],
            [picture, question],
            label="questions of the benchmark",
            cache_examples=False,
        )
        # after the inputs were filled in
        examples.load_input_event.then(respond, inputs, answers, api_visibility="private", **served)
    made.queue(max_size=WAITING)
    return made


def launch(
    playground: Playground, host: str = "127.0.0.1", port: int | None = None, share: bool = False
) -> Any:
    """Show the page and return it; it is served by threads of its own until ``close()``."""
    gr = gradio()
    made = page(playground)
    # fonts of the system: those of Gradio's themes are asked for on the network
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        made.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=theme,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            max_file_size=LARGEST_UPLOAD,
        )
    except OSError as error:
        raise VlmPruneError(
            f"the page cannot be served on {host}, port {port or 'any'} ({error}); give another --port"
        ) from error
    if share and not made.share_url:
        made.close()
        raise VlmPruneError(
            "there is no public link: Gradio's servers could not be reached; leave out --share"
        )
    return made


def gradio() -> Any:
    """The module, imported without its statistics; an error names the extra where it is missing."""
    # read when it is imported; an answer of the user's own stands
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as found
    except ImportError as error:
        raise UnsupportedError(
            "the demo is a page of Gradio, which is not installed; install the extra in the clone: pip "
            'install -e ".[demo]"'
        ) from error
    return found


def _picture_input(gr: Any, shown: Any) -> Any:
    """Gradio's input for pictures, which gives the path of what was uploaded, whatever that is.

    Its own reads the file first, and a broken one is an error without a word about the picture.
    """
    # PNG: an example goes through the browser and must come back as it was
    made = gr.Image(
        shown,
        label="picture",
        elem_id="picture",
        type="filepath",
        format="png",
        sources=["upload", "clipboard"],
        height=240,
    )
    # of this one input: for a subclass Gradio writes a stub file beside the code that defines it
    made.preprocess = lambda payload: None if payload is None else payload.path
    return made


def _head(playground: Playground) -> str:
    lines = [
        f"# vlmprune: {playground.name or 'a model'}",
        "Ask one question about one picture. Each card shows a method: the visual tokens that it kept, and "
        "what the model answered. `dense` reads all of them. Times are of one run on this machine.",
        "In the pictures kept patches are outlined, dropped ones dark, merged ones pale. What is striped the "
        "model never sees.",
    ]
    if playground.name in BUNDLED:
        lines.append(f"*Note: {BUNDLED_NOTE.format(playground.name)}.*")
    return "\n\n".join(lines)
