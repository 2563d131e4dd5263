# SPDX-License-Identifier: Apache-2.0
"""What every family can do, as data: measured by conformance checks on tiny models, kept in
``assets/capabilities.json``.

``python docs/capabilities.py`` measures and writes it; ``vlmprune list --families`` shows it; a test fails
when it is stale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..api import prune
from ..errors import UnsupportedError
from ..hooks.session import Session
from ..models import adapter_for, families
from ..registry import attachable_methods, get
from .checks_generation import MODES, batched_modes_agree, hand_written_loop, second_turn
from .checks_model import attention_back_ends_agree, threads_do_not_meet, training_works
from .checks_sequence import batch_row_equals_alone, cut_equals_hand_built
from .conformance import (
    CLIP_FRAMES,
    RAGGED,
    TINY_OPTIONS,
    Subject,
    close,
    default_spec,
    expect,
    generate,
    report_of,
    run_check,
)
from .families import family_of, layout_of
from .reference import language_model
from .tiny import tiny_inputs

# what the capabilities of a family are measured with; the second where nothing is read of the tower
SPEC, OF_FEATURES = "fastervlm(cls=mean)@9", "divprune@9"


def batch(subject: Subject) -> None:
    """Rows of different lengths answer as they do alone."""
    batch_row_equals_alone(subject)


def several_images(subject: Subject) -> None:
    """A prompt with three images."""
    inputs = tiny_inputs(subject.family, images=(3,))
    with subject.prune() as run:
        generate(subject.model, inputs, max_new_tokens=2)
    check_counts(run, 3, least=0 if subject.keeps_nothing else 1)


def video(subject: Subject) -> None:
    """A clip beside an image; for methods that read clips only, a clip in every row."""
    layout = layout_of(subject.family)
    if layout.video is None:
        raise UnsupportedError(f"{subject.family} has no clips of its own; give it frames as images")
    images = (0, 0) if subject.clips or not layout.mixes else (1, 0)
    inputs = tiny_inputs(subject.family, images=images, video=True, frames=CLIP_FRAMES)
    with subject.prune() as run:
        generate(subject.model, inputs, max_new_tokens=2)
    check_counts(run, sum(images) + 2, least=0 if subject.keeps_nothing else 1)


def check_counts(run: Session, pictures: int, least: int = 1) -> None:
    """Every picture kept what the budget gives it, or no more than it had where a schedule or no budget
    decides.
    """
    report = report_of(run)
    dense, realised = report.dense_tokens, report.realised_tokens
    expect(len(realised) == pictures, f"{len(realised)} pictures were reported, expected {pictures}")
    if "before_lm" not in run.slots or run.budget is None:
        # DyVTE lets all of them go, and a falling schedule may end with none of a small picture
        least = 0 if run.method.counts == "own" or run.method.slot == "inside_lm" else 1
        expect(
            all(least <= kept <= count for kept, count in zip(realised, dense, strict=True)),
            f"{realised} of {dense} tokens kept",
        )
        return
    wanted = [run.budget.count(count) for count in dense]
    expect(realised == wanted, f"{realised} tokens kept, the budget gives {wanted}")


def _mode(name: str) -> Callable[[Subject], None]:
    def check(subject: Subject) -> None:
        inputs = subject.inputs((1,))
        with subject.prune():
            greedy = generate(subject.model, inputs)
            got = generate(subject.model, inputs, **MODES[name])
        expect(torch.equal(got, greedy), f"{name}: {got.tolist()}, a dynamic cache gives {greedy.tolist()}")

    return check


def compiled(subject: Subject) -> None:
    """torch.compile of the whole model while attached, and of its language model before: the same answer, no
    faster.
    """
    inputs, graphs = subject.inputs((1,)), []

    # a back end that only counts graphs and runs them as they are
    def count(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    def last_logits(model: Any) -> Tensor:
        return model(**inputs).logits[0, -1]

    torch.compiler.reset()  # what other models compiled counts against the limit of recompilations
    # one is compiled while attached, the other before
    whole, part = subject.fresh_model(), subject.fresh_model()
    with torch.no_grad():
        with subject.prune(whole):
            want = last_logits(whole)
            close(
                last_logits(torch.compile(whole, backend=count)), want, "compiled while attached, the answer"
            )
        expect(len(graphs) > 1, f"{len(graphs)} graphs were compiled: the model ran as it is")
        language_model(part).compile(backend=count)
        dense = last_logits(part)
        with subject.prune(part):
            close(last_logits(part), want, "compiled before attaching, the answer")
        close(last_logits(part), dense, "compiled, the dense answer after detaching")
    torch.compiler.reset()


def device_map(subject: Subject) -> None:
    """Weights placed by accelerate: every second decoder layer on disk, loaded when it runs, the rest on the
    CPU.
    """
    try:
        from accelerate import dispatch_model
    except ImportError as error:
        raise UnsupportedError("accelerate is not here: pip install accelerate") from error
    inputs, model = subject.inputs((1,)), subject.fresh_model()
    adapter = adapter_for(model)
    if adapter.within != "model":
        raise LookupError("not measured: the decoder of this family stands below a causal language model")
    # all but the decoder layers stays on the CPU
    parts = [name for name, _ in model.model.named_children() if name != adapter.text]
    parts += [name for name, _ in model.model.named_parameters(recurse=False)]  # such as an image newline
    text = [
        f"{adapter.text}.{name}" for name, _ in adapter.language_model.named_children() if name != "layers"
    ]
    places = {f"model.{name}": "cpu" for name in (*parts, *text)} | {"lm_head": "cpu"}
    for i in range(len(adapter.language_model.layers)):
        places[f"model.{adapter.text}.layers.{i}"] = "cpu" if i % 2 else "disk"
    with TemporaryDirectory() as folder:
        model = dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
        with subject.prune():
            want = generate(subject.model, inputs, max_new_tokens=3)
        with prune(model, subject.spec):
            got = generate(model, inputs, max_new_tokens=3)
    expect(torch.equal(got, want), f"offloaded {got.tolist()}, whole {want.tolist()}")


def flash(subject: Subject) -> None:
    """FlashAttention needs a GPU."""
    if not torch.cuda.is_available():
        # ``cell`` makes an answer of it; ``run_check`` lets it through
        raise LookupError("not measured: no GPU was here")
    model = subject.fresh_model(dtype=torch.bfloat16).cuda()
    inputs = {name: value.cuda() for name, value in subject.inputs(RAGGED).items()}
    answers = []
    for implementation in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(implementation)
        with prune(model, subject.spec):
            answers.append(generate(model, inputs, max_new_tokens=2))
    expect(torch.equal(*answers), f"sdpa and flash answer differently: {[one.tolist() for one in answers]}")


CAPABILITIES: dict[str, Callable[[Subject], None]] = {
    "batch": batch,
    "several images": several_images,
    "video": video,
    "eager, sdpa": attention_back_ends_agree,
    "flash": flash,
    "static cache": _mode("static cache"),
    "no cache": _mode("no cache"),
    "beams": batched_modes_agree,
    "second turn": second_turn,
    "hand-written loop": hand_written_loop,
    "training": training_works,
    "threads": threads_do_not_meet,
    "compile": compiled,
    "device_map": device_map,
}
# what is measured for every method; the others do not depend on it
OF_METHODS = (
    "batch",
    "several images",
    "video",
    "eager, sdpa",
    "flash",
    "static cache",
    "beams",
    "compile",
    "device_map",
)
SLOW = ("compile", "device_map")
OPTIONS = {
    "cls='mean'": "cls=mean",
    "estimator='zo'": "estimator=zo",
    "place='after'": "place=after",
    "norm='l2'": "norm=l2",
}  # what a refusal says, and the option in a spec


def spec_for(family: str) -> str:
    """What the capabilities of a family are measured with."""
    return SPEC if family_of(family).reads_tower else OF_FEATURES


def method_names() -> list[str]:
    """The built-in methods."""
    return [name for name in attachable_methods() if get(name).__module__.startswith("vlmprune.")]


def runs(subject: Subject) -> None:
    """A method on a family: equal to its reference, or what it does to attention equal to its eager twin."""
    from .checks_attention import edit_equals_eager_twin
    from .checks_decode import steps_equal_eager_twin

    twins = {"attention": edit_equals_eager_twin, "decode": steps_equal_eager_twin}
    twins.get(subject.method.slot, cut_equals_hand_built)(subject)


def measure(family: str, method: str, left_out: Sequence[str] = ()) -> dict[str, str]:
    """A method on a family: the spec that was tried, whether it "runs", and if so what else it can do.

    A method that the family refuses is tried with the option that the refusal names, and with what that one
    is refused with. What is ``left_out`` is said to be not measured.
    """
    spec = default_spec(method)
    found = cell(family, spec)
    options: list[str] = []
    while found.startswith("no: ") and (more := _named(found, options)):
        options += more
        given = ",".join(options)
        spec = default_spec(_with_options(method, given))
        found = cell(family, spec)
    row = {"spec": spec, "runs": found}
    if found != "yes":
        return row
    return row | {name: or_not(family, spec, name, left_out) for name in OF_METHODS}


def or_not(family: str, spec: str, name: str, left_out: Sequence[str]) -> str:
    """A cell, or that it is not measured."""
    if name in left_out:
        return f"not measured: {name} {'takes long' if name in SLOW else 'was left out'}"
    return cell(family, spec, name)


def _with_options(method: str, options: str) -> str:
    """The spec of a method with these options; a wrapper passes them on to what it wraps."""
    if get(method).wraps:
        return f"{method}+fastervlm({options})"
    # vscan(shallow=1) becomes vscan(shallow=1,cls=mean)
    name, _, others = TINY_OPTIONS.get(method, method).rstrip(")").partition("(")
    return f"{name}({','.join(filter(None, (others, options)))})"


def _named(refusal: str, tried: list[str]) -> list[str]:
    """The first option that a refusal names and that was not tried; none or one."""
    return [text for hint, text in OPTIONS.items() if hint in refusal and text not in tried][:1]


def cell(family: str, spec: str, capability: str | None = None) -> str:
    """One cell: "yes", "no: what works instead" or "not measured: why"; a failure raises."""
    check = runs if capability is None else CAPABILITIES[capability]
    try:
        result = run_check(capability or "runs", check, Subject(spec, family))
    except LookupError as error:
        return str(error)
    if result.status == "fail":
        raise AssertionError(f"{family}, {spec}, {capability or 'runs'}: {result.detail}")
    if result.status == "pass":
        return "yes"
    # a package that is not here says nothing of the method
    return ("not measured: " if "install" in result.detail else "no: ") + result.detail


def stale(found: dict[str, Any]) -> list[str]:
    """What a table lacks or has too much, in words."""
    wrong = [f"family {name}" for name in sorted(set(families()) ^ set(found["families"]))]
    for name, row in found["families"].items():
        wrong += [f"{name}: capability {one}" for one in sorted(set(CAPABILITIES) ^ set(row["capabilities"]))]
        wrong += [f"{name}: method {one}" for one in sorted(set(method_names()) ^ set(row["methods"]))]
        for method, cells in row["methods"].items():
            wanted = {"spec", "runs", *(OF_METHODS if cells["runs"] == "yes" else ())}
            wrong += [f"{name}: {method}: {one}" for one in sorted(wanted ^ set(cells))]
    return wrong
