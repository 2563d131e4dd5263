# SPDX-License-Identifier: Apache-2.0
"""docs/serve.md as a user follows it: its command starts the server, its client asks."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from page_blocks import blocks_of, promised, run_block
from served_http import body, post, read, server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
COMMAND = "vlmprune serve tiny --prune fastervlm@36"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    assert f"```bash\n{COMMAND}\n```" in PAGE.read_text(encoding="utf-8")
    log = tmp_path_factory.mktemp("server") / "log"
    with server(shlex.split(COMMAND)[1:], log) as made:
        yield made


def test_the_client_of_the_page_is_told_what_the_page_says(address):
    (client,) = blocks_of(PAGE)
    assert client.count("http://127.0.0.1:8000/") == 1
    said = run_block(client.replace("http://127.0.0.1:8000", address), str(PAGE), {})
    assert said == promised(client) and len(said) == 2


def test_a_request_may_name_a_spec_only_where_the_server_was_told_so(address):
    status, text = post(address, body("text", 3, "divprune@32"))
    assert status == 400 and "trust-request-mm-kwargs" in text
    assert post(address, body("text", 3, None))[0] == 200


def test_metrics_are_those_that_the_page_names(address):
    post(address, body("text", 3, None))
    named = set(re.findall(r"`(vlmprune_\w+_total)`", PAGE.read_text(encoding="utf-8")))
    told = {line.split("{")[0] for line in read(address, "/metrics").splitlines() if "fastervlm@36" in line}
    told = {name for name in told if not name.endswith("_created")}  # of the client of Prometheus
    assert len(named) == 4
    # nothing fell back, so that there is nothing to show of it
    assert told == named - {"vlmprune_fallbacks_total"}


def test_the_body_of_a_request_with_a_spec_is_taken(tmp_path_factory):
    """With the server that the page starts for it."""
    page = PAGE.read_text(encoding="utf-8")
    bodies = [json.loads(given) for given in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    command = "vlmprune serve tiny --per-request"
    assert f"`{command}`" in page
    (asked,) = [one for one in bodies if "messages" in one]  # others are parts of one
    assert asked["messages"] == []
    whole, spec = body("text", 3, None), asked["mm_processor_kwargs"]["vlmprune"]
    asked["messages"] = json.loads(whole)["messages"]
    log = tmp_path_factory.mktemp("per_request") / "log"
    with server(shlex.split(command)[1:], log) as address:
        used = [
            json.loads(post(address, data)[1])["usage"]["prompt_tokens"]
            for data in (whole, json.dumps(asked).encode())
        ]
    assert spec == "divprune@32" and used[0] - used[1] == 144 - 32
