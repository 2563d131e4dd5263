# SPDX-License-Identifier: Apache-2.0
"""``vlmprune demo``: methods side by side, in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from .screen import plain, stderr, stdout
from .threads import Threads, limit_threads


def demo(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="'tiny', a folder, or an HF id.")] = "tiny",
    host: Annotated[
        str, typer.Option(help="Address to serve on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; the first free one from 7860 unless given.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Let everybody with the link in, through Gradio's servers.")
    ] = False,
    copies: Annotated[
        int, typer.Option(min=1, help="Of the model: as many users are answered at the same time.")
    ] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    threads: Threads = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Compare methods on a picture of yours, on a page in the browser.

    The page is served to this machine alone unless --host or --share say otherwise. Nothing is reported.
    """
    from ..demo.page import gradio, launch
    from ..demo.playground import Playground

    gradio()  # before gigabytes are read
    limit_threads(context, model, threads)
    with stderr().status(f"loading {model}"):
        playground = Playground.load(
            model,
            device,
            dtype,
            copies=copies,
            max_new_tokens=max_new_tokens,
            trust_remote_code=trust_remote_code,
        )
        page = launch(playground, host, port, share)
    for address in filter(None, (page.local_url, page.share_url)):
        stdout().print(plain(f"Open {address} (Ctrl-C ends it)"), soft_wrap=True)
    # the page is served by other threads: without this the command would end here
    page.block_thread()
