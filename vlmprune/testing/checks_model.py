# SPDX-License-Identifier: Apache-2.0
"""Checks of the model around a session: nothing left behind, nothing leaked, any attention, training, little
memory.
"""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..api import prune
from ..errors import InvariantError, UnsupportedError
from ..hooks.patches import ATTACHED
from ..models import adapter_for
from .checks_inside import no_map_of_the_sequence, rounding
from .conformance import RAGGED, Subject, close, expect, generate, report_of
from .families import layout_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that a session might leave on a model: hooks, attributes, classes, config objects,
    buffers."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = tuple(len(getattr(module, kind)) for kind in HOOKS)
        found[name] = (
            type(module),
            frozenset(module.__dict__),
            hooks,
            id(getattr(module, "config", None)),
            len(module._buffers),
        )
    found["config"] = str(model.config.to_dict())
    return found


def nothing_stays(subject: Subject) -> None:
    """A-B-A gives A's first answer; after detach, also after an exception inside generate, the model is what
    it was.
    """
    model, inputs = subject.fresh_model(), subject.inputs(RAGGED)
    dense = generate(
        model, inputs
    )  # transformers leaves hooks of its own at the first call: snapshot after it
    before = snapshot(model)
    other = "random@5" if subject.method.name != "random" else "divprune@5"
    answers = []
    for spec in (subject.spec, other, subject.spec):
        with prune(model, spec):
            answers.append(generate(model, inputs))
    expect(torch.equal(answers[0], answers[2]), "A-B-A: the second A differs from the first")
    expect(
        snapshot(model) == before,
        f"left behind: {[n for n, s in snapshot(model).items() if before.get(n) != s][:3]}",
    )

    class Boom(Exception):
        pass

    def explode(module: Any, args: Any) -> None:
        raise Boom

    run = subject.prune(model).attach()
    adapter = adapter_for(model)
    tower = adapter.capture(()).towers[-1] if subject.clips else adapter.vision_tower
    # inside the language model, and inside the tower
    for place in (adapter.language_model.layers[1], tower):
        bomb = place.register_forward_pre_hook(explode)
        try:
            generate(model, inputs)
            raise AssertionError("the exception inside generate was swallowed")
        except Boom:
            pass
        finally:
            bomb.remove()
    # still attached
    expect(torch.equal(generate(model, inputs), answers[0]), "the call after an exception differs")
    run.detach()
    run.detach()
    expect(snapshot(model) == before, "left behind after an exception and two detaches")
    expect(torch.equal(generate(model, inputs), dense), "dense answer differs after detach")


def attach_twice_is_refused(subject: Subject) -> None:
    """A second session on the same model raises and leaves the first working; a disabled session is dense."""
    model, inputs = subject.model, subject.inputs((1,))
    dense = generate(model, inputs)
    with subject.prune() as run:
        pruned = generate(model, inputs)
        try:
            prune(model, "uniform@4").attach()
            raise AssertionError("attaching twice was accepted")
        except InvariantError as error:
            expect("detach" in str(error), "the error does not say what to do")
        expect(torch.equal(generate(model, inputs), pruned), "a refused second session disturbed the first")
        run.enabled = False
        expect(torch.equal(generate(model, inputs), dense), "a disabled session is not dense")


def threads_do_not_meet(subject: Subject) -> None:
    """Four calls at once on one attached model, and two models with two methods, equal one call after the
    other.
    """
    if find_spec("transformers.utils.output_capturing") is None:
        raise UnsupportedError(
            "this transformers swaps forward methods during a call, so calls at once meet even without "
            "pruning: use 5.x"
        )
    model, batches = subject.model, [subject.inputs((1,), seed=s) for s in range(4)]
    other_model = subject.fresh_model(seed=1)
    with subject.prune(), prune(other_model, "random@4"):
        # one after the other
        jobs = [(model, batch) for batch in batches] + [(other_model, batches[0])]
        want = [generate(m, batch) for m, batch in jobs]
        with ThreadPoolExecutor(len(jobs)) as pool:
            got = list(pool.map(lambda job: generate(*job), jobs))
    expect(
        all(torch.equal(a, b) for a, b in zip(want, got, strict=True)), "concurrent calls answer differently"
    )


def attention_back_ends_agree(subject: Subject) -> None:
    """Eager and SDPA keep the same tokens and agree on the logits."""
    inputs, found = subject.inputs(RAGGED), {}
    model = subject.fresh_model()
    if not adapter_for(model).language_model._supports_sdpa:
        raise UnsupportedError(
            f"transformers runs {type(adapter_for(model).language_model).__name__} in eager attention only"
        )
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with prune(model, subject.spec) as run, torch.no_grad():
            found[implementation] = (
                model(**inputs).logits[:, -1],
                [m.keep_idx.tolist() for m in report_of(run).keep],
            )
    expect(found["eager"][1] == found["sdpa"][1], "eager and SDPA keep different tokens")
    # both round their own way, in the tower as well
    close(found["eager"][0], found["sdpa"][0], "logits under eager and SDPA", tolerance=rounding(model))


def training_works(subject: Subject) -> None:
    """Loss and gradients flow through a cut; shapes are those of the dense model."""
    model, inputs = subject.fresh_model(), subject.inputs((1, 1))
    # no loss at padding and at placeholders
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    with subject.prune(model):
        output = model(**inputs, labels=labels)
        output.loss.backward()
    expect(output.logits.shape[:2] == inputs["input_ids"].shape, "logits are not of the full length")
    expect(bool(output.loss.isfinite()), f"loss is {output.loss}")
    adapter = adapter_for(model)
    encoder = {"projector": adapter.projector or adapter.vision_tower}  # of some families none is known
    parts = {"language_model": adapter.language_model} | ({} if subject.keeps_nothing else encoder)
    for part, module in parts.items():
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        expect(bool(grads) and any(float(g.abs().sum()) > 0 for g in grads), f"no gradient reaches {part}")


class _Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default and args[1:] and args[1] % result.ndim == result.ndim - 1:
            return result  # channels side by side: they may be as many as tokens by chance
        given = {storage_of(t) for t in args if isinstance(t, torch.Tensor)}
        self.shapes += [
            tuple(t.shape)
            for t in (result if isinstance(result, tuple | list) else (result,))
            if isinstance(t, torch.Tensor) and storage_of(t) not in given  # a view of a tensor holds nothing
        ]
        return result


def storage_of(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor begins."""
    return tensor.untyped_storage().data_ptr()


def no_attention_map(subject: Subject) -> None:
    """Score capture never holds a tokens x tokens map and leaves the tower on its own attention."""
    if subject.inside:
        return no_map_of_the_sequence(subject, _Shapes)
    inputs = subject.inputs((1,))
    model = subject.model
    # images, or the clips of methods that read clips
    read = next(one for one in adapter_for(model).modalities if inputs.get(one.pixels) is not None)
    encode = getattr(adapter_for(model).inner, read.encode)
    names, n = set(inspect.signature(encode).parameters) & set(inputs), layout_of(subject.family).patches
    shapes, channels = {}, 0
    for attached in (False, True):
        run = subject.prune().attach() if attached else None
        try:
            with _Shapes() as seen, torch.no_grad():
                # looked up anew: a session puts its own in its place
                output = getattr(adapter_for(model).inner, read.encode)(**{n: inputs[n] for n in names})
            if run is not None:
                # transformers before 5 returns lists, which nothing can ride on
                held = getattr(output, ATTACHED, None)
                captured = {} if held is None else held.pictures[0].captured
                channels = sum(value.shape[-1] for value in captured.values())
        finally:
            if run is not None:
                run.detach()
        # as large as tokens x tokens, with or without [CLS]
        shapes[attached] = [
            s for s in seen.shapes if len(s) >= 3 and min(s[-2:]) >= n and max(s[-2:]) <= n + 1
        ]
    if channels in (n, n + 1):  # (crops, tokens, channels) of what was captured look like a map
        shapes = {at: [s for s in some if len(s) > 3 or s[-1] != channels] for at, some in shapes.items()}
    new = len(shapes[True]) - len(shapes[False])
    expect(new <= 0, f"attached, {new} more tokens x tokens tensors are made: {set(shapes[True])}")
    return None


CHECKS = {
    "nothing_stays": nothing_stays,
    "attach_twice_is_refused": attach_twice_is_refused,
    "threads_do_not_meet": threads_do_not_meet,
    "attention_back_ends_agree": attention_back_ends_agree,
    "training_works": training_works,
    "no_attention_map": no_attention_map,
}
