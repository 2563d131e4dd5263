# SPDX-License-Identifier: Apache-2.0
"""Many clients of one server, dense against pruned, interleaved, at several concurrencies.

    python benchmarks/serving_load.py --model tiny --specs dense fastervlm@36 --concurrency 1 4 16
    python benchmarks/serving_load.py --model random --scale 8 --specs dense fastervlm@64
    python benchmarks/serving_load.py --server http://localhost:8000 --specs dense fastervlm@64

The load client is vLLM's own (``vllm bench serve``, random text and random pictures), which sends a spec with
each request. One server answers all specs, so that what the machine does besides meets all of them. Every
round asks every spec at every concurrency with the same pictures, in another order; the pictures of another
round are new. Without ``--server`` one is started, and ended again.

Per spec and concurrency, medians over the rounds: ``prompt``, tokens of a prompt as the server counted them;
median and 99th percentile of the time to the first token over the requests of a round; answer tokens and
requests per second; the most KV blocks that were seen in use, looked at ten times a second. Gains are ratios
to the first spec within a round: their median, least and most. "pays" and "does not pay" take three rounds
that agree. Wall clock: take them on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

START = 900  # seconds
FEWEST = 3  # rounds that a verdict takes
COMMAND = "from vlmprune.cli import main; main()"


@dataclass(frozen=True)
class Run:
    """What one spec gave at one concurrency in one round."""

    spec: str
    at_once: int
    round: int
    prompt: float
    first_token_ms: float
    first_token_p99_ms: float
    tokens_per_s: float
    requests_per_s: float
    kv_blocks: float


@dataclass(frozen=True)
class Gain:
    """How much better than the first spec, per round: above 1 is better."""

    rounds: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """``"gain"`` or ``"loss"`` where all rounds agree, else ``"unclear"``."""
        if len(self.rounds) < FEWEST:
            return "unclear"
        if min(self.rounds) > 1:
            return "gain"
        return "loss" if max(self.rounds) <= 1 else "unclear"

    def __str__(self) -> str:
        return f"{statistics.median(self.rounds):.2f}x ({min(self.rounds):.2f} to {max(self.rounds):.2f})"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--server", metavar="URL", help="of a server that was started with --per-request on this machine")
    add("--model", default="tiny", help="served where no --server is given: tiny, natural, random, or a name")
    add("--scale", type=int, default=8, help="divides width and depth of the model random; 8 runs on a CPU")
    add("--engine", default="", metavar="OPTIONS", help="of that server, e.g. '--max-num-seqs 16'")
    add("--specs", nargs="+", default=["dense", "fastervlm@36"], help="the first is what others are held to")
    add("--concurrency", nargs="+", type=int, default=[1, 4, 16], metavar="CLIENTS")
    add("--requests", type=int, default=32, help="of each spec at each concurrency in a round")
    add("--rounds", type=int, default=3)
    add("--side", type=int, default=336, help="of the pictures, in pixels")
    add("--words", type=int, default=16, help="random text tokens of a prompt")
    add("--answer", type=int, default=8, help="tokens of an answer")
    add("--json", action="store_true", help="print the runs as JSON and nothing else")
    return parser.parse_args(given)


class Server:
    """What a server says of itself."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def read(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=60) as answer:
            return answer.read().decode()

    def alive(self) -> bool:
        try:
            self.read("/health")
        except OSError:  # refused, reset, or too slow
            return False
        return True

    def model(self) -> tuple[str, str]:
        """(name, folder or name on the hub, which has the tokenizer)."""
        (first, *_) = json.loads(self.read("/v1/models"))["data"]
        return first["id"], first.get("root") or first["id"]

    def prompt_tokens(self) -> float:
        return total(self.read("/metrics"), "vllm:prompt_tokens_total")

    def kv_blocks(self) -> float:
        """KV blocks that are in use now."""
        return blocks_in_use(self.read("/metrics"))


def samples(metrics: str, name: str) -> list[tuple[str, float]]:
    """(labels, value) of every sample of one name in the text that Prometheus reads."""
    found = re.findall(rf"^{re.escape(name)}(\{{.*\}})? (\S+)$", metrics, re.MULTILINE)
    if not found:
        raise SystemExit(f"the server's /metrics has no {name}; expected a server of vLLM 0.32.0")
    return [(labels, float(value)) for labels, value in found]


def total(metrics: str, name: str) -> float:
    return sum(value for _, value in samples(metrics, name))


def blocks_in_use(metrics: str) -> float:
    """The share of the KV cache that is in use, times its blocks; of one engine."""
    ((labels, _), *_) = samples(metrics, "vllm:cache_config_info")
    count = re.search(r'num_gpu_blocks="(\d+)"', labels)
    if count is None:
        raise SystemExit(f"vllm:cache_config_info has no number of blocks: {labels}")
    return total(metrics, "vllm:kv_cache_usage_perc") * int(count[1])


class Watch:
    """Looks at the KV cache while a load runs."""

    def __init__(self, look: Callable[[], float], pause: float = 0.1) -> None:
        self.look, self.pause = look, pause
        self.most = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(self.pause):
            self.most = max(self.most, self.look())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


class Client:
    """vLLM's load client in this process."""

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self.server, self.options = server, options
        self.name, self.root = server.model()

    def line(self, spec: str, at_once: int, seed: int) -> list[str]:
        """What is asked of ``vllm bench serve``."""
        options = self.options
        asked: dict[str, Any] = {
            "backend": "openai-chat",
            "base-url": self.server.address,
            "endpoint": "/v1/chat/completions",
            "model": self.root,
            "served-model-name": self.name,
            "dataset-name": "random-mm",
            "num-prompts": options.requests,
            "random-input-len": options.words,
            "random-output-len": options.answer,
            "random-mm-base-items-per-request": 1,
            "random-mm-limit-mm-per-prompt": json.dumps({"image": 1}),
            "random-mm-bucket-config": str({(options.side, options.side, 1): 1.0}),
            "max-concurrency": at_once,
            "seed": seed,
            "temperature": 0,
            # a prompt that is sent first, to see whether the server is there, would be counted
            "ready-check-timeout-sec": 0,
            "extra-body": json.dumps({"mm_processor_kwargs": {"vlmprune": spec}}),
        }
        # answers of equal length, whatever a spec makes of them
        return [*(f"--{name}={value}" for name, value in asked.items()), "--ignore-eos", "--disable-tqdm"]

    def run(self, spec: str, at_once: int, number: int, seed: int) -> Run:
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        asked = parser.parse_args(self.line(spec, at_once, seed))
        before = self.server.prompt_tokens()
        said = io.StringIO()
        with Watch(self.server.kv_blocks) as watch, contextlib.redirect_stdout(said):
            result = main(asked)
        if result["completed"] != self.options.requests:
            raise SystemExit(
                f"{spec}, {at_once} at once: {result['completed']} of {self.options.requests} requests were "
                f"answered; see the server's log. The client said:\n{said.getvalue()[-2000:]}"
            )
        read = self.server.prompt_tokens() - before
        return as_run(spec, at_once, number, result, read / self.options.requests, watch.most)


def as_run(spec: str, at_once: int, number: int, result: dict, prompt: float, blocks: float) -> Run:
    """A run from what vLLM's client returned."""
    return Run(
        spec,
        at_once,
        number,
        prompt,
        result["median_ttft_ms"],
        result["p99_ttft_ms"],
        result["output_throughput"],
        result["request_throughput"],
        blocks,
    )


def measure(run: Callable[[str, int, int, int], Run], options: argparse.Namespace) -> list[Run]:
    """All runs; ``run(spec, at_once, round, seed)`` makes one. Round 0 warms up and is thrown away."""
    runs = []
    for number in range(options.rounds + 1):
        for place, at_once in enumerate(options.concurrency):
            # one seed for all specs: they meet the same pictures, which no earlier run has met
            seed = number * len(options.concurrency) + place
            turn = number % len(options.specs)
            for spec in options.specs[turn:] + options.specs[:turn]:
                made = run(spec, at_once, number, seed)
                if number:
                    runs.append(made)
    return runs


def chosen(runs: Sequence[Run], spec: str, at_once: int) -> list[Run]:
    """The runs of one spec at one concurrency, by round."""
    some = [one for one in runs if (one.spec, one.at_once) == (spec, at_once)]
    return sorted(some, key=lambda one: one.round)


def gains(runs: Sequence[Run], base: str, spec: str, at_once: int) -> dict[str, Gain]:
    """First token and throughput of a spec against the first one, within each round."""
    pairs = list(zip(chosen(runs, base, at_once), chosen(runs, spec, at_once), strict=True))
    return {
        "first token": Gain(tuple(one.first_token_ms / other.first_token_ms for one, other in pairs)),
        "throughput": Gain(tuple(other.requests_per_s / one.requests_per_s for one, other in pairs)),
    }


def verdict(found: dict[str, Gain]) -> str:
    """Whether pruning pays, in words; only what all rounds agree on is said."""
    words = {"gain": "pays", "loss": "does not pay", "unclear": "not clear"}
    by_word = {word: [name for name, gain in found.items() if gain.verdict == word] for word in words}
    said = [(words[word], names) for word, names in by_word.items() if names]
    if len(said) == 1:
        return said[0][0]
    return ", ".join(f"{word} in {' and '.join(names)}" for word, names in said)


_COLUMNS = (
    ("prompt", 8, 0),
    ("first_token_ms", 12, 1),
    ("first_token_p99_ms", 12, 1),
    ("tokens_per_s", 10, 1),
    ("requests_per_s", 11, 2),
    ("kv_blocks", 10, 0),
)


def table(runs: Sequence[Run], specs: Sequence[str], concurrency: Sequence[int]) -> list[str]:
    """Medians over the rounds, then what every spec gains against the first."""
    names = ("prompt", "first, ms", "p99, ms", "tokens/s", "requests/s", "KV blocks")
    head = "".join(f"{name:>{width}}" for name, (_, width, _) in zip(names, _COLUMNS, strict=True))
    lines = [f"{'at once':>7}  {'spec':24}{head}"]
    for at_once in concurrency:
        for spec in specs:
            some = chosen(runs, spec, at_once)
            values = "".join(
                f"{statistics.median(getattr(one, name) for one in some):{width}.{digits}f}"
                for name, width, digits in _COLUMNS
            )
            lines.append(f"{at_once:7}  {spec:24}{values}")
    for at_once in concurrency:
        for spec in specs[1:]:
            found = gains(runs, specs[0], spec, at_once)
            said = ", ".join(f"{name} {gain}" for name, gain in found.items())
            lines.append(f"{spec} against {specs[0]}, {at_once} at once: {said}: {verdict(found)}")
    return lines


def random_llava(folder: Path, scale: int) -> Path:
    """A random model in the shape of LLaVA-1.5-7B, divided, which speaks the words of the bundled model.

    A picture is 576 tokens at every scale.
    """
    import torch
    from transformers import AutoProcessor

    from vlmprune.models.tiny import FOLDER
    from vlmprune.speed.shapes import config_of, random_model

    processor = AutoProcessor.from_pretrained(FOLDER)
    config = config_of("llava-1.5-7b", scale)
    vision = config.vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    processor.image_processor.size = processor.image_processor.crop_size = size
    processor.patch_size = vision.patch_size
    config.image_token_index = processor.image_token_id
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    config.text_config.vocab_size = len(processor.tokenizer)
    model = random_model(config, "cpu", torch.float32 if scale > 1 else torch.bfloat16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def served(options: argparse.Namespace) -> Iterator[Server]:
    """The server that was named, or one that lives as long as this."""
    if options.server:
        yield Server(options.server)
        return
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "random")
        model = str(random_llava(made, options.scale)) if options.model == "random" else options.model
        command = [sys.executable, "-c", COMMAND, "serve", model, "--per-request", "--"]
        command += ["--host", "127.0.0.1", "--port", str(port), *shlex.split(options.engine)]
        log = Path(folder, "log")
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out)
            try:
                server = Server(f"http://127.0.0.1:{port}")
                wait(server, process, log)
                yield server
            finally:
                process.terminate()
                process.wait(120)


def wait(server: Server, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + START
    while not server.alive():
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")
        time.sleep(1)


def main() -> None:
    options = arguments()
    with served(options) as server:
        runs = measure(Client(server, options).run, options)
    if options.json:
        print(json.dumps([asdict(one) for one in runs], indent=1))
    else:
        print("\n".join(table(runs, options.specs, options.concurrency)))


if __name__ == "__main__":
    main()
