# SPDX-License-Identifier: Apache-2.0
"""``vlmprune serve tiny``: a server on the loopback, clients with different specs, and bad requests."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from served_http import body, post, read, server

import vlmprune

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SPECS = ("divprune@36", "fastervlm@36", "visionzip@36", None)  # None: what the server was started with
DEFAULT = "uniform@36"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def address(log):
    given = ["serve", "tiny", "--prune", DEFAULT, "--per-request"]
    engine = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8"]
    with server(given, log, *engine) as made:
        # pictures that vLLM makes up at its start are not those of requests
        assert "vlmprune_pictures_total{" not in read(made, "/metrics")
        yield made


def expected(family: str, number: int, spec: str) -> str:
    model, processor = vlmprune.load("tiny")
    picture, question, _ = vlmprune.example(family, number)
    inputs = vlmprune.encode(model, processor, picture, question)
    with vlmprune.prune(model, spec):
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_eight_clients_with_four_specs_get_the_answers_of_transformers(address):
    jobs = [(family, 3, spec) for family in ("text", "attribute", "count") for spec in SPECS] * 2
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda job: post(address, body(*job)), jobs))
    assert [status for status, _ in answers] == [200] * len(jobs)
    told = [json.loads(text) for _, text in answers]
    given = [one["choices"][0]["message"]["content"].strip() for one in told]
    wanted = {job: expected(job[0], job[1], job[2] or DEFAULT).strip() for job in set(jobs)}
    assert given == [wanted[job] for job in jobs]
    dense = json.loads(post(address, body("text", 3, "dense"))[1])["usage"]["prompt_tokens"]
    assert {
        dense - one["usage"]["prompt_tokens"] for one, job in zip(told, jobs, strict=True) if job[0] == "text"
    } == {108}


def test_answers_can_be_streamed(address):
    status, text = post(address, body("text", 3, "divprune@36", stream=True))
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert status == 200 and said.strip() == expected("text", 3, "divprune@36").strip()


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("nonsense@9", "unknown"),
        ("fastv(layer=2)@9", "before the language model"),
        ("divprune@9/total", "per total"),
        ("fastervlm(layer=-1)@9", "first 5 of 6 blocks"),
        ("fastervlm(\ud800=1)@9", "cannot read the options"),
    ],
)
def test_a_bad_request_gets_400_and_the_server_lives(address, spec, why):
    status, text = post(address, body("text", 3, spec))
    assert status == 400 and why in text
    assert post(address, body("text", 3, "divprune@36"))[0] == 200


@pytest.mark.parametrize(
    "options",
    [
        {"crop_size": {"height": 84, "width": 84}},
        {"do_resize": False, "do_center_crop": False},
        {"do_resize": None, "do_center_crop": None},
    ],
)
def test_a_request_that_shapes_pictures_otherwise_gets_400_and_the_server_lives(address, options):
    status, text = post(address, body("text", 3, None, mm_processor_kwargs=options))
    assert status == 400 and "--mm-processor-kwargs" in text
    assert post(address, body("text", 3, "divprune@36"))[0] == 200


def test_a_client_that_leaves_does_not_end_the_server(address):
    host, port = address.removeprefix("http://").split(":")
    data = body("count", 5, "divprune@36", max_tokens=200, ignore_eos=True)
    with socket.create_connection((host, int(port))) as one:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        one.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        time.sleep(0.2)
    assert post(address, body("text", 3, None))[0] == 200


def test_metrics_count_by_spec(address):
    post(address, body("text", 3, "holov@36"))
    lines = read(address, "/metrics").splitlines()
    assert 'vlmprune_pictures_total{spec="holov@36"} 1.0' in lines
    assert 'vlmprune_kept_tokens_total{spec="holov@36"} 36.0' in lines


def test_the_log_says_what_is_pruned_at_the_start_and_later(address, log):
    post(address, body("text", 3, "pool@36"))
    lines = log.read_text(encoding="utf-8")
    assert f"requests that name no spec are served under {DEFAULT}" in lines
    assert "pool@36: 1 picture, 144 -> 36 tokens each" in lines
