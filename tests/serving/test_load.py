# SPDX-License-Identifier: Apache-2.0
"""benchmarks/serving_load.py: its arithmetic, what it asks for, and what it prints, without a server."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import serving_load
from serving_load import Gain, Run

METRICS = """# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:cache_config_info{block_size="32",engine="0",num_cpu_blocks="7",num_gpu_blocks="128"} 1.0
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 1530.0
vllm:prompt_tokens_total{engine="1",model_name="tiny"} 1e+02
vllm:prompt_tokens_by_source_total{engine="0",source="x"} 9.0
"""


def run(spec, number, first, rate, at_once=4, prompt=153.0):
    return Run(spec, at_once, number, prompt, first, 2 * first, 8 * rate, rate, 40)


def rounds(spec, firsts, rates, **more):
    pairs = zip(firsts, rates, strict=True)
    return [run(spec, number, first, rate, **more) for number, (first, rate) in enumerate(pairs, 1)]


DENSE = rounds("dense", (100, 110, 90), (10, 11, 9))


def test_metrics_are_added_up_and_blocks_counted():
    assert serving_load.total(METRICS, "vllm:prompt_tokens_total") == 1630
    assert serving_load.blocks_in_use(METRICS) == 32
    with pytest.raises(SystemExit, match="no vllm:gone"):
        serving_load.total(METRICS, "vllm:gone")


def test_the_most_blocks_that_were_seen_are_held():
    seen, all_seen = iter([1, 7, 3]), threading.Event()

    def look():
        value = next(seen, None)
        if value is None:
            all_seen.set()
        return value or 0

    with serving_load.Watch(look, pause=0.001) as watch:
        assert all_seen.wait(30)
    assert watch.most == 7 and not watch._thread.is_alive()


def test_gains_are_ratios_within_a_round():
    pruned = rounds("pool@36", (50, 100, 45), (20, 11, 18))
    found = serving_load.gains([*pruned, *DENSE], "dense", "pool@36", 4)
    assert found["first token"].rounds == pytest.approx((2, 1.1, 2))
    assert found["throughput"].rounds == pytest.approx((2, 1, 2))
    assert str(found["first token"]) == "2.00x (1.10 to 2.00)"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((1.1, 1.2, 1.3), "gain"),
        ((0.9, 1.0, 0.8), "loss"),
        ((1.1, 0.9, 1.3), "unclear"),
        ((2.0, 2.0), "unclear"),  # two rounds prove nothing
    ],
)
def test_a_gain_is_one_only_where_all_rounds_agree(values, word):
    assert Gain(values).verdict == word


@pytest.mark.parametrize(
    ("first", "rate", "said"),
    [
        ((1.2,) * 3, (1.1,) * 3, "pays"),
        ((1.2,) * 3, (1.1, 0.9, 1.0), "pays in first token, not clear in throughput"),
        ((0.9,) * 3, (0.8,) * 3, "does not pay"),
        ((0.9,) * 3, (0.8, 1.2, 1.0), "does not pay in first token, not clear in throughput"),
        ((0.9,) * 3, (1.5,) * 3, "pays in throughput, does not pay in first token"),
        ((1.1, 0.9, 1.0), (1.1, 0.9, 1.0), "not clear"),
        ((2.0,), (2.0,), "not clear"),
    ],
)
def test_the_verdict_says_when_pruning_does_not_pay(first, rate, said):
    assert serving_load.verdict({"first token": Gain(first), "throughput": Gain(rate)}) == said


def test_the_table_has_medians_and_a_verdict_per_concurrency():
    pruned = rounds("pool@36", (50, 55, 45), (20, 22, 18), prompt=45.0)
    alone = [run(spec, number, 10, 5, at_once=1) for spec in ("dense", "pool@36") for number in (1, 2, 3)]
    lines = serving_load.table([*DENSE, *pruned, *alone], ["dense", "pool@36"], [1, 4])
    assert " ".join(lines[0].split()) == (
        "at once spec prompt first, ms p99, ms tokens/s requests/s KV blocks"
    )
    assert lines[3].split() == ["4", "dense", "153", "100.0", "200.0", "80.0", "10.00", "40"]
    assert lines[4].split() == ["4", "pool@36", "45", "50.0", "100.0", "160.0", "20.00", "40"]
    assert lines[5].endswith("1.00x (1.00 to 1.00): does not pay")
    assert lines[6] == (
        "pool@36 against dense, 4 at once: first token 2.00x (2.00 to 2.00), "
        "throughput 2.00x (2.00 to 2.00): pays"
    )


def test_specs_take_turns_with_the_same_pictures_and_the_first_round_is_thrown_away():
    options = serving_load.arguments(
        ["--specs", "dense", "pool@9", "--concurrency", "1", "8", "--rounds", "2"]
    )
    asked = []

    def one(spec, at_once, number, seed):
        asked.append((number, at_once, spec, seed))
        return run(spec, number, 1, 1, at_once)

    runs = serving_load.measure(one, options)
    assert {made.round for made in runs} == {1, 2} and len(runs) == 8 and len(asked) == 12
    assert [spec for number, at_once, spec, _ in asked if at_once == 1] == (
        ["dense", "pool@9", "pool@9", "dense", "dense", "pool@9"]
    )
    seeds = {(number, at_once): seed for number, at_once, _, seed in asked}
    assert len(set(seeds.values())) == len(seeds) == 6  # of all specs alike, of no other round


def test_the_client_is_asked_to_send_the_spec():
    options = serving_load.arguments(["--requests", "5", "--side", "144"])

    server = SimpleNamespace(address="http://here:1", model=lambda: ("tiny", "/models/tiny"))
    line = serving_load.Client(server, options).line("divprune@9", 4, 7)
    asked = dict(one.removeprefix("--").split("=", 1) for one in line[:-2])
    assert json.loads(asked["extra-body"]) == {"mm_processor_kwargs": {"vlmprune": "divprune@9"}}
    assert (asked["served-model-name"], asked["model"]) == ("tiny", "/models/tiny")
    assert line[-2:] == ["--ignore-eos", "--disable-tqdm"]
    assert (asked["num-prompts"], asked["max-concurrency"], asked["seed"]) == ("5", "4", "7")


@pytest.mark.slow
def test_the_random_model_has_as_many_visual_tokens_as_the_real_one(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import vlmprune

    folder = serving_load.random_llava(tmp_path, 8)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    picture, _, _ = vlmprune.example()
    token = AutoProcessor.from_pretrained(folder).image_token
    inputs = AutoProcessor.from_pretrained(folder)(images=picture, text=f"{token} which", return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 576
    with vlmprune.prune(model, "fastervlm@64") as run:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert len(run.last.kept[0]) == 64
