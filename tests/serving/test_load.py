# SPDX-License-Identifier: Apache-2.0
"""benchmarks/serving_load.py and its table: arithmetic, what is asked for, and what is printed, without a
server.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import serving_load
import serving_table
from serving_load import Asked
from serving_table import Gain, Row, Run

METRICS = """# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:cache_config_info{block_size="32",engine="0",num_cpu_blocks="7",num_gpu_blocks="128"} 1.0
vllm:prompt_tokens_total{engine="0",model_name="tiny"} 1530.0
vllm:prompt_tokens_total{engine="1",model_name="tiny"} 1e+02
vllm:prompt_tokens_by_source_total{engine="0",source="x"} 9.0
"""


def run(spec, number, first, rate, at_once=4, prompt=153.0):
    return Run(spec, at_once, number, prompt, first, 2 * first, 8 * rate, rate, 40)


def answered(one):
    """A run as it was asked for, by a server that prunes."""
    return run(one.spec, one.round, 1, 1, one.at_once, 153.0 if one.spec == "dense" else 64.0)


def rounds(spec, firsts, rates, **more):
    pairs = zip(firsts, rates, strict=True)
    return [run(spec, number, first, rate, **more) for number, (first, rate) in enumerate(pairs, 1)]


DENSE = rounds("dense", (100, 110, 90), (10, 11, 9))


def test_metrics_are_added_up_and_blocks_counted():
    assert serving_load.total(METRICS, "vllm:prompt_tokens_total") == 1630
    assert serving_load.blocks_in_use(METRICS) == 32
    with pytest.raises(SystemExit, match="no vllm:gone"):
        serving_load.total(METRICS, "vllm:gone")


def test_a_server_that_prunes_nothing_is_no_result():
    """A server without the plug-in takes the key of a request and leaves it unread."""
    asked = [Asked("dense", 4, 1, 0), Asked("fastervlm@64", 4, 1, 0)]
    kept = []
    with pytest.raises(SystemExit, match=r"fastervlm@64: its prompts have 153 tokens, and dense ones 153"):
        serving_load.measure(lambda one: run(one.spec, one.round, 100, 10), asked, kept.append)
    assert [one.spec for one in kept] == ["dense"]


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
    found = serving_table.gains([*pruned, *DENSE], "dense", "pool@36", 4)
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
    assert serving_table.verdict({"first token": Gain(first), "throughput": Gain(rate)}) == said


def test_the_table_has_medians_and_a_verdict_per_concurrency():
    pruned = rounds("pool@36", (50, 55, 45), (20, 22, 18), prompt=45.0)
    alone = [run(spec, number, 10, 5, at_once=1) for spec in ("dense", "pool@36") for number in (1, 2, 3)]
    lines = serving_table.table([*DENSE, *pruned, *alone], ["dense", "pool@36"], [1, 4])
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


OPTIONS = ("--specs", "dense", "pool@9", "--concurrency", "1", "8", "--rounds", "2")


def test_specs_take_turns_with_the_same_pictures():
    asked = serving_load.lacking(serving_load.arguments(OPTIONS))
    counted = [one for one in asked if one.round]
    assert len(asked) == 10 and len(counted) == 8
    assert [(one.spec, one.at_once) for one in asked[:2]] == [("dense", 8), ("pool@9", 8)]
    assert [one.spec for one in counted if one.at_once == 1] == ["pool@9", "dense", "dense", "pool@9"]
    seeds = {(one.round, one.at_once): one.seed for one in asked}
    # of all specs alike, of no other round, nor of what warms up
    assert len(set(seeds.values())) == len(seeds) == 5


def test_a_run_that_was_stopped_goes_on(tmp_path):
    options, file = serving_load.arguments(OPTIONS), tmp_path / "load.jsonl"
    asked, shared = serving_load.lacking(options), serving_load.same(options)

    def made(one):
        if one is asked[5]:
            raise KeyboardInterrupt
        return answered(one)

    def keep(one):
        serving_table.append(file, Row(shared, {}, one))

    with pytest.raises(KeyboardInterrupt):
        serving_load.measure(made, asked, keep)
    with file.open("a") as out:
        out.write('{"same": {"mod')  # killed while it wrote
    done = [row.run for row in serving_table.read(file, shared)]
    # what warms up is not kept, and is asked again of the new server
    assert [(one.spec, one.round) for one in done] == [(one.spec, one.round) for one in asked[2:5]]
    assert serving_load.lacking(options, done) == asked[:2] + asked[5:]
    serving_load.measure(answered, asked[5:], keep)
    assert serving_load.lacking(options, [row.run for row in serving_table.read(file, shared)]) == []


def test_runs_of_other_options_are_not_mixed(tmp_path):
    file = tmp_path / "load.jsonl"
    serving_table.append(file, Row(serving_load.same(serving_load.arguments(OPTIONS)), {}, DENSE[0]))
    other = serving_load.same(serving_load.arguments([*OPTIONS, "--words", "99"]))
    with pytest.raises(SystemExit, match=r"line 1 was measured with {'words': 16}, not {'words': 99}"):
        serving_table.read(file, other)


def rows(runs, load=0.2):
    same = {"specs": ["dense", "pool@36"], "concurrency": [4], "requests": 8, "side": 336, "answer": 8}
    told = {"versions": {"vllm": "0.32.0"}, "processor": "2 x Some", "load_before": load}
    told |= {"date": "2026-11-28T10:00:00+00:00", "commit": "abc"}
    return [Row(same, told, one) for one in runs]


def test_the_page_has_medians_and_says_where_pruning_does_not_pay():
    slower = rounds("pool@36", (200, 200, 200), (5, 5, 5), prompt=45.0)
    text = serving_table.section(rows([*DENSE, *slower], load=0.9))
    assert "| 4 | `dense` | 153 | 100.0 | 200.0 | 10.00 | 40 |  |  |  |" in text
    assert "| 0.50x (0.45 to 0.55) | 0.50x (0.45 to 0.56) | does not pay |" in text
    assert "Does not pay: `pool@36` (clients: 4)." in text
    assert "load before the start 0.9, **a busy machine**; 2026-11-28, commit abc" in text


def test_the_page_takes_whole_rounds_only():
    half = [*DENSE, *rounds("pool@36", (50, 55), (20, 22))]
    assert "in each of 2 rounds" in (text := serving_table.section(rows(half)))
    assert "Not clear: `pool@36` (clients: 4)." in text and "busy" not in text
    for lines in ([], rows(DENSE)):
        assert serving_table.section(lines).startswith("It has not been run")


def test_the_page_shows_the_runs_that_are_kept():
    page = serving_table.PAGE.read_text(encoding="utf-8")
    kept = serving_table.read(serving_table.RESULTS)
    assert serving_table.filled(page, kept) == page, "run python benchmarks/serving_table.py"


def test_the_client_is_asked_to_send_the_spec():
    options = serving_load.arguments(["--requests", "5", "--side", "144"])

    server = SimpleNamespace(address="http://here:1", model=lambda: ("tiny", "/models/tiny"))
    line = serving_load.Client(server, options).line(Asked("divprune@9", 4, 1, 7))
    asked = dict(one.removeprefix("--").split("=", 1) for one in line[:-2])
    assert json.loads(asked["extra-body"]) == {"mm_processor_kwargs": {"vlmprune": "divprune@9"}}
    assert (asked["served-model-name"], asked["model"]) == ("tiny", "/models/tiny")
    assert line[-2:] == ["--ignore-eos", "--disable-tqdm"]
    assert (asked["num-prompts"], asked["max-concurrency"], asked["seed"]) == ("5", "4", "7")


@pytest.mark.slow
def test_the_random_model_has_as_many_visual_tokens_as_the_real_one(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import vlmprune

    folder = serving_load.random_llava(tmp_path, 8)
    tower = [name for name in load_file(folder / "model.safetensors") if name.startswith("vision_tower.")]
    # vLLM looks for the names of released checkpoints
    assert tower and all(name.startswith("vision_tower.vision_model.") for name in tower)
    model, told = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    picture, _, _ = vlmprune.example()
    token = AutoProcessor.from_pretrained(folder).image_token
    inputs = AutoProcessor.from_pretrained(folder)(images=picture, text=f"{token} which", return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 576
    with vlmprune.prune(model, "fastervlm@64") as run:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert len(run.last.kept[0]) == 64
