# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT inside vLLM, where newlines stand between the patches: answers are those of vlmprune.prune.

An engine of its own, in a process of its own: run this file alone.
"""

from __future__ import annotations

import random

import pytest

pytestmark = pytest.mark.vllm
SPECS = (
    "dense",
    "fastervlm@9",
    "divprune@0.25",
    "visionzip@12",
    "pool@9",
    "uniform@20",
    "zooprune@9",
    "vispruner@12",
)
# (height, width): wide, tall, square, very wide, and two pictures of different shape in one prompt
PROMPTS = [[(84, 168)], [(200, 90)], [(168, 168)], [(60, 250)], [(100, 100), (168, 84)]]
NEW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model whose heads are wide enough for vLLM, with the weights named as it reads them."""
    from safetensors.torch import load_file, save_file

    from vlmprune.testing.tiny import tiny_model, tiny_processor

    made = tmp_path_factory.mktemp("llava_next")
    options = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    tiny_model("llava_next", **options).save_pretrained(made)
    tiny_processor("llava_next").save_pretrained(made)
    (file,) = made.glob("*.safetensors")
    plain, full = "vision_tower.", "vision_tower.vision_model."
    weights = {
        name if full in name else name.replace(plain, full): one for name, one in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def twin(folder):
    """The model in transformers, and the processor as vLLM loads it: resizing differs between its forms."""
    from transformers import AutoProcessor

    from vlmprune.testing.tiny import tiny_model

    options = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return tiny_model("llava_next", **options), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def engine(folder):
    import vllm

    from vlmprune.serving import overrides

    return vllm.LLM(
        str(folder),
        hf_overrides=overrides("fastervlm@9"),
        dtype="float32",
        enforce_eager=True,
        distributed_executor_backend="uni",
        max_model_len=1024,
        max_num_batched_tokens=512,
        max_num_seqs=8,
        block_size=32,
        limit_mm_per_prompt={"image": 2},
    )


def jobs_of(model, processor):
    """(request, answer of transformers) of every prompt with every spec, shuffled."""
    import numpy as np
    from PIL import Image

    import vlmprune

    draw, token, jobs = np.random.default_rng(0), model.config.image_token_id, []
    for sizes in PROMPTS:
        images = [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        text = "<image>" * len(images) + "\nwhat is it ? tell me"
        inputs = processor(images=images, text=text, return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        first, last = ids.index(token), len(ids) - ids[::-1].index(token)
        short = [*ids[:first], *[token] * len(images), *ids[last:]]
        for spec in SPECS:
            with vlmprune.prune(model, spec):
                out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            options = {"mm_processor_kwargs": {"vlmprune": spec}}
            request = {"prompt_token_ids": short, "multi_modal_data": {"image": images}, **options}
            jobs.append((request, out[0, len(ids) :].tolist()))
    random.Random(0).shuffle(jobs)
    return jobs


def test_answers_are_those_of_transformers(engine, twin):
    import vllm

    model, processor = twin
    jobs = jobs_of(model, processor)
    never = {token: -100.0 for token in model.generation_config.suppress_tokens}
    greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logit_bias=never)
    outputs = engine.generate([request for request, _ in jobs], greedy, use_tqdm=False)
    wrong = [
        (request["mm_processor_kwargs"], given, wanted)
        for (request, wanted), output in zip(jobs, outputs, strict=True)
        if (given := list(output.outputs[0].token_ids)) != wanted
    ]
    assert wrong == []
