# SPDX-License-Identifier: Apache-2.0
"""What conformance checks ask of methods that cut inside the language model: equality with the slow eager
twin.

Cuts before the language model are compared with hand-built embeddings; a cut between layers has none, so the
checks of those names run these instead. Scores need no check of their own: the twin ranks by the maps of
eager attention.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..hooks.attention_tap import find_attention
from ..hooks.sequence.cache import cache_in
from .conformance import RAGGED, Subject, close, expect, generate, report_of, shared_model
from .families import family_of
from .reference import dense_rows, language_model, merged_embeddings, placeholder_columns
from .reference_inside import Twin, masked
from .reference_masks import any_window


@lru_cache(maxsize=16)
def eager_model(family: str, tower: str | None, text: str | None) -> Any:
    """The weights of ``shared_model`` under eager attention, which returns its maps."""
    model = copy.deepcopy(shared_model(family, tower, text))
    model.set_attn_implementation("eager")
    return model


def twins(subject: Subject, inputs: dict[str, Tensor], counts: Sequence[int], policy: str) -> list[Twin]:
    """One twin per row; ``counts`` are the patches of the pictures in the order in which they stand in the
    batch.
    """
    model = eager_model(subject.family, subject.tower, subject.text)
    embeds, rows = merged_embeddings(model, inputs), dense_rows(model, inputs)
    patches = placeholder_columns(model, inputs["input_ids"], embeds)
    # the counts are used up row by row
    pending, found = list(counts), []
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        padding = int((~mask).sum())
        columns, pictures = [c - padding for c in patches[row]], []  # without the padding in front
        while columns:
            count = pending.pop(0)
            pictures.append(columns[:count])
            columns = columns[count:]
        # text is what stands behind the last placeholder
        image = (inputs["input_ids"][row, mask] == model.config.image_token_id).nonzero()[:, 0].tolist()
        length = int(mask.sum())
        text = list(range(image[-1] + 1, length)) if image else []
        found.append(Twin(model, subject.method, subject.budget, policy, rows[row], pictures, text))
    return found


def gates_experts(model: Any) -> bool:
    """Whether a decoder has gated running states and a mixture of experts behind them."""
    layers = language_model(model).layers
    mixes = any(hasattr(getattr(layer, "mlp", None), "experts") for layer in layers)
    return mixes and any(hasattr(layer, "linear_attn") for layer in layers)


def rounding(model: Any) -> float:
    """What logits may differ by from the twin, which attends eagerly and so rounds its own way.

    A gated running state enlarges that: noise of 1e-7 in the embeddings of a tiny Qwen3.5 moves its logits
    by 2e-4, a hundred times as far as those of a Qwen3-VL, and those of its mixture of experts by 9e-4.
    Norms behind attention (GLM-4) enlarge it less: a dense GLM-4.6V under eager attention and SDPA differs by
    4e-5. A wrong token moves them by 1e-2 and more.
    """
    layers = language_model(model).layers
    if any(hasattr(layer, "linear_attn") for layer in layers):
        return 1e-3 if gates_experts(model) else 5e-4
    return 2e-4 if any(hasattr(layer, "post_self_attn_layernorm") for layer in layers) else 5e-5


def cut_equals_twin(subject: Subject) -> None:
    """Every row of a ragged batch answers as the twin does, and alone has its logits; both position
    policies."""
    inputs = subject.inputs(RAGGED)
    for positions in subject.policies:
        with subject.prune(positions=positions) as run:
            ids = generate(subject.model, inputs)
            counts = report_of(run).dense_tokens
            rows = [
                subject.model(**subject.row(inputs, i, RAGGED)).logits[0, -1].detach()
                for i in range(len(RAGGED))
            ]
        for i, twin in enumerate(twins(subject, inputs, counts, positions)):
            want = twin.greedy(ids.shape[1])
            expect(
                ids[i].tolist() == want,
                f"{positions} row {i}: answer {ids[i].tolist()}, the twin says {want}",
            )
            close(
                rows[i], twin.logits()[-1], f"{positions} row {i} logits", tolerance=rounding(subject.model)
            )


def counts_follow_the_schedule(run: Any) -> None:
    """What the report says of the last forward is what the method's stages announce."""
    report = report_of(run)
    layers = torch.zeros(run.depth)
    for dense, realised, kept in zip(report.dense_tokens, report.realised_tokens, report.keep, strict=True):
        here = [dense] * run.depth
        # later layers read what a cut lets through; one that lets through more than is there cuts nothing
        for stage in run.method.cuts(run.depth, run.budget, dense):
            here[stage.layer :] = [min(stage.keep, here[stage.layer])] * (run.depth - stage.layer)
        # mean over the pictures
        layers += torch.tensor(here) / len(report.dense_tokens)
        expect(realised == here[-1], f"{realised} tokens realised, the schedule gives {here[-1]} of {dense}")
        merges = run.method.kind() == "merge"
        expect(merges or len(kept) == realised, f"KeepMap holds {len(kept)} tokens, {realised} were realised")
    expect(
        torch.allclose(layers, torch.tensor(report.tokens_per_layer)),
        f"{report.tokens_per_layer} tokens per layer, announced {layers.tolist()}",
    )


def every_mode_equals_twin(subject: Subject, modes: dict[str, dict[str, Any]]) -> None:
    """Every mode equals a model that masks what is cut; what was chosen for the prompt stays chosen without a
    cache too.
    """
    inputs = subject.inputs((1,))
    with subject.prune() as run, torch.no_grad():
        subject.model(**inputs)
    twin = twins(subject, inputs, report_of(run).dense_tokens, run.positions)[0]
    # windows count held tokens, and running states take in masked ones: no mask can say either of a cache
    # that holds all
    sliding = any_window(subject.model, inputs["input_ids"].shape[1] + 5) or family_of(subject.family).hybrid
    for mode, options in modes.items():
        if sliding and not (mode in ("greedy", "static cache") or "use_cache" in options):
            continue
        with subject.prune():
            torch.manual_seed(0)
            got = generate(subject.model, inputs, **options)
        if sliding or "use_cache" in options:
            want = torch.tensor([twin.greedy(got.shape[1])])
        else:
            # fills ``kept`` and ``merged``, which the masked model follows
            twin.logits()
            with masked(twin.model, twin.kept, twin.merged, twin.policy) as model:
                torch.manual_seed(0)
                want = generate(model, inputs, **with_any_cache(options))
        expect(torch.equal(got, want), f"{mode}: {got.tolist()}, expected {want.tolist()}")


def with_any_cache(options: dict[str, Any]) -> dict[str, Any]:
    """The same mode on the cache that every model has: the answer is to be the same, and PaliGemma 2 has no
    static one.
    """
    return {name: option for name, option in options.items() if name != "cache_implementation"}


def drafts_are_no_prompt(subject: Subject) -> None:
    """Prompt look-up appends drafts to the prompt in the very first forward; the cut is still that of the
    prompt alone.
    """
    inputs = subject.inputs((1,), text_len=9)
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, -8:-4]  # repeated words are what is looked up
    if not subject.model._supports_logits_to_keep():
        with subject.prune():
            try:
                generate(subject.model, inputs, prompt_lookup_num_tokens=3, eos_token_id=2**20)
            except UnsupportedError as error:
                expect("generate without drafts" in str(error), f"unclear error: {error}")
                return
        raise AssertionError("drafts that cannot be told from the prompt were taken for it")
    with subject.prune():
        want = generate(subject.model, inputs, max_new_tokens=8)
        # 4.57 needs an end-of-text id here; this one is never generated
        got = generate(
            subject.model, inputs, max_new_tokens=8, prompt_lookup_num_tokens=3, eos_token_id=2**20
        )
    expect(torch.equal(got[:, :8], want), f"with drafts {got.tolist()}, without {want.tolist()}")


def second_turn_equals_twin(subject: Subject) -> None:
    """A second question on the kept cache, and on a deep copy, equals recomputing the dialogue with the first
    turn's cut.
    """
    for positions in subject.policies:
        inputs = subject.inputs((1,))
        question = subject.inputs((0,), seed=5)["input_ids"]
        with subject.prune(positions=positions) as run, torch.no_grad():
            first = subject.model.generate(
                **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
            )
            counts, cache = report_of(run).dense_tokens, cache_in(first)
            # layers with a running state hold no slots
            counting = [i for i in range(run.depth) if hasattr(cache.layers[i], "get_seq_length")]
            held = [int(cache.get_seq_length(layer)) for layer in counting]
            seen = int(cache.get_seq_length())
            per_layer = [report_of(run).tokens_per_layer[layer] for layer in counting]
            dropped = [seen - slots for slots in held]
            expect(
                dropped == [round(sum(counts) - tokens) for tokens in per_layer],
                f"the cache says {seen} seen and {held} held, {per_layer} of {sum(counts)} visual tokens "
                "were read",
            )
            ids = torch.cat([first.sequences, question], 1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            # before the first answer, which lets the cache grow
            copied = copy.deepcopy(cache)
            answers = [generate(subject.model, turn, cache=c)[0].tolist() for c in (cache, copied)]
        expect(answers[0] == answers[1], "a deep-copied cache answers differently")
        twin = twins(subject, inputs, counts, positions)[0]
        want = twin.greedy(5, given=ids[0, inputs["input_ids"].shape[1] :].tolist())
        expect(answers[0] == want, f"{positions}: second answer {answers[0]}, the twin says {want}")


def no_map_of_the_sequence(subject: Subject, made: Any) -> None:
    """Ranking makes no heads x tokens x tokens map; ``made`` records the shapes of all tensors of a block."""
    inputs, shapes = subject.inputs((1,)), {}
    # of the sequence in front of all cuts and behind them; a grid of patches may have such sides in both runs
    lengths = {inputs["input_ids"].shape[1]}
    for attached in (False, True):
        run = subject.prune().attach() if attached else None
        track = (
            language_model(subject.model)
            .layers[-1]
            .register_forward_pre_hook(
                lambda module, args, kwargs: lengths.add(
                    (args[0] if args else kwargs["hidden_states"]).shape[1]
                ),
                with_kwargs=True,
            )
        )
        try:
            with made() as seen, torch.no_grad():
                subject.model(**inputs)
        finally:
            track.remove()
            if run is not None:
                run.detach()
        shapes[attached] = list(seen.shapes)
    attention = next(m for layer in language_model(subject.model).layers if (m := find_attention(layer)))
    # those are queries, keys and values; latent keys are of another width
    lengths -= {getattr(attention, name, 0) for name in ("head_dim", "qk_head_dim", "v_head_dim")}
    found = {
        attached: [s for s in seen if len(s) == 4 and s[1] > 1 and s[2] in lengths and s[3] in lengths]
        for attached, seen in shapes.items()
    }
    new = len(found[True]) - len(found[False])
    expect(new <= 0, f"attached, {new} more maps of the sequence are made: {set(found[True])}")
