# SPDX-License-Identifier: Apache-2.0
"""``vlmprune serve`` as a process of its own, and clients of it."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import vlmprune

START = 400  # seconds
COMMAND = "from vlmprune.cli import main; main()"


@contextmanager
def server(given: Sequence[str], log: Path, *engine: str) -> Iterator[str]:
    """The address of ``vlmprune GIVEN -- ENGINE`` on a free port of the loopback, while it runs."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    options = ["--", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *engine]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *given, *options], stdout=out, stderr=out, env=environment
        )
        try:
            until = time.monotonic() + START
            while not alive(address):
                if process.poll() is not None or time.monotonic() > until:
                    pytest.fail(f"the server did not start: {log.read_text(encoding='utf-8')[-3000:]}")
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait(120)


def alive(address: str) -> bool:
    try:
        read(address, "/health")
    except OSError:  # URLError, a refused connection, a timeout
        return False
    return True


def read(address: str, path: str) -> str:
    with urllib.request.urlopen(f"{address}{path}", timeout=60) as answer:
        return answer.read().decode()


def body(family: str, number: int, spec: str | None, **more: object) -> bytes:
    """A request about an example; None: it names no spec."""
    picture, question, _ = vlmprune.example(family, number)
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": question}]
    chat = {"model": "tiny", "temperature": 0, "max_tokens": 4, **more}
    if spec is not None:
        chat["mm_processor_kwargs"] = {"vlmprune": spec}
    return json.dumps({**chat, "messages": [{"role": "user", "content": content}]}).encode()


def post(address: str, data: bytes) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
