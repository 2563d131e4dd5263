# SPDX-License-Identifier: Apache-2.0
"""Many clients of one server, dense against pruned, interleaved, at several concurrencies.

    python benchmarks/serving_load.py --model tiny --specs dense fastervlm@36 --concurrency 1 4 16
    python benchmarks/serving_load.py --model random --scale 8 --specs dense fastervlm@64
    python benchmarks/serving_load.py --server http://localhost:8000 --specs dense fastervlm@64
    .ci/serving load FOLDER     # the run of docs/serve.md; then python benchmarks/serving_table.py

The load client is vLLM's own (``vllm bench serve``, random text and random pictures), which sends a spec with
each request. One server answers all specs, so that what the machine does besides meets all of them. First
every spec is asked once at the most clients, uncounted. Then every round asks every spec at every concurrency
with the same pictures, in another order; the pictures of another round are new. Without ``--server`` one is
started, and ended again.

Per spec and concurrency, medians over the rounds: ``prompt``, tokens of a prompt as the server counted them;
median and 99th percentile of the time to the first token over the requests of a round; answer tokens and
requests per second; the most KV blocks that were seen in use, looked at ten times a second. What a gain and a
verdict are says serving_table.py. Wall clock: take it on an idle machine.

With ``--out FILE`` every run is written to the file when it ends, and the same command goes on with those
that lack.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import shlex
import socket
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

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves the folder of a script out

from serving_table import Row, Run, append, read, table

START = 900  # seconds
COMMAND = "from vlmprune.cli import main; main()"
# what all runs of a file share: of the options, and of the environment
SAME = ("model", "scale", "engine", "specs", "concurrency", "requests", "side", "words", "answer")
ENVIRONMENT = ("OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND")


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
    add("--out", type=Path, metavar="FILE", help="write every run to it (.jsonl), and go on where it ends")
    add("--json", action="store_true", help="print the runs as JSON and nothing else")
    return parser.parse_args(given)


@dataclass(frozen=True)
class Asked:
    """A run that is still to be made."""

    spec: str
    at_once: int
    round: int
    seed: int


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

    def line(self, one: Asked) -> list[str]:
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
            "max-concurrency": one.at_once,
            "seed": one.seed,
            "temperature": 0,
            # a prompt that is sent first, to see whether the server is there, would be counted
            "ready-check-timeout-sec": 0,
            "extra-body": json.dumps({"mm_processor_kwargs": {"vlmprune": one.spec}}),
        }
        # answers of equal length, whatever a spec makes of them
        return [*(f"--{name}={value}" for name, value in asked.items()), "--ignore-eos", "--disable-tqdm"]

    def run(self, one: Asked) -> Run:
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        asked = parser.parse_args(self.line(one))
        before = self.server.prompt_tokens()
        said = io.StringIO()
        with Watch(self.server.kv_blocks) as watch, contextlib.redirect_stdout(said):
            result = main(asked)
        if result["completed"] != self.options.requests:
            raise SystemExit(
                f"{one.spec}, {one.at_once} at once: {result['completed']} of {self.options.requests} "
                f"requests were answered. The client said:\n{said.getvalue()[-2000:]}"
            )
        read = self.server.prompt_tokens() - before
        return as_run(one, result, read / self.options.requests, watch.most)


def as_run(asked: Asked, result: dict, prompt: float, blocks: float) -> Run:
    """A run from what vLLM's client returned."""
    return Run(
        asked.spec,
        asked.at_once,
        asked.round,
        prompt,
        result["median_ttft_ms"],
        result["p99_ttft_ms"],
        result["output_throughput"],
        result["request_throughput"],
        blocks,
    )


def lacking(options: argparse.Namespace, done: Sequence[Run] = ()) -> list[Asked]:
    """The runs that ``done`` lacks, in the order in which they are made; round 0 warms up."""
    have = {(one.spec, one.at_once, one.round) for one in done}
    specs, concurrency = options.specs, options.concurrency
    asked = []
    for number in range(1, options.rounds + 1):
        for place, at_once in enumerate(concurrency):
            # one seed for all specs: they meet the same pictures, which no earlier run has met
            seed = number * len(concurrency) + place
            turn = number % len(specs)
            for spec in specs[turn:] + specs[:turn]:
                if (spec, at_once, number) not in have:
                    asked.append(Asked(spec, at_once, number, seed))
    if not asked:
        return []
    # also where a file goes on: a server that has just started is slower
    return [*(Asked(spec, max(concurrency), 0, 0) for spec in specs), *asked]


def measure(run: Callable[[Asked], Run], asked: Sequence[Asked], keep: Callable[[Run], None]) -> None:
    """Make the runs; ``keep`` is given each when it ends, but for those that warm up."""
    prompts: dict[str, float] = {}  # their tokens, by spec
    for number, one in enumerate(asked, 1):
        made = run(one)
        prompts[one.spec] = made.prompt
        if one.spec != "dense" and made.prompt >= prompts.get("dense", math.inf):
            raise SystemExit(
                f"{one.spec}: its prompts have {made.prompt:.0f} tokens, and dense ones "
                f"{prompts['dense']:.0f}: the server prunes nothing; is vlmprune installed where it runs, "
                "and not hidden by another one in the folder that it was started in?"
            )
        if made.round:
            keep(made)
        print(
            f"{number} of {len(asked)}: round {made.round}, {made.at_once} at once, {made.spec}: first token "
            f"{made.first_token_ms:.0f} ms, {made.requests_per_s:.2f} requests/s",
            file=sys.stderr,
            flush=True,
        )


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
    model.save_pretrained(folder, max_shard_size="1TB")
    processor.save_pretrained(folder)
    _rename_tower(folder / "model.safetensors")
    return folder


def _rename_tower(file: Path) -> None:
    """Give the weights of the tower the names that released checkpoints have, which vLLM knows."""
    from safetensors.torch import load_file, save_file

    plain, released = "vision_tower.", "vision_tower.vision_model."
    weights = {
        name if released in name else name.replace(plain, released): value
        for name, value in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


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
                wait(server, process)
                yield server
            except BaseException:
                print(f"the server's log ends so:\n{log.read_text()[-30000:]}", file=sys.stderr)
                raise
            finally:
                process.terminate()
                process.wait(120)


def wait(server: Server, process: subprocess.Popen) -> None:
    until = time.monotonic() + START
    while not server.alive():
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit("the server did not start")
        time.sleep(1)


def same(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a file share."""
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return {name: getattr(options, name) for name in SAME} | {"environment": environment}


def conditions() -> dict[str, Any]:
    """Of this machine now, with the version of vLLM."""
    import vllm

    from vlmprune.speed.conditions import conditions

    found = conditions()
    return found | {"versions": {"vllm": vllm.__version__, **found["versions"]}}


def main() -> None:
    options = arguments()
    shared = same(options)
    rows = read(options.out, shared) if options.out else []
    asked = lacking(options, [row.run for row in rows])
    now = conditions()

    def keep(made: Run) -> None:
        rows.append(Row(shared, now, made))
        if options.out:
            append(options.out, rows[-1])

    if asked:
        with served(options) as server:
            measure(Client(server, options).run, asked, keep)
    runs = [row.run for row in rows]
    if options.json:
        print(json.dumps([asdict(one) for one in runs], indent=1))
    else:
        print("\n".join(table(runs, options.specs, options.concurrency)))


if __name__ == "__main__":
    main()
