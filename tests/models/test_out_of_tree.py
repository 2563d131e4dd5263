# SPDX-License-Identifier: Apache-2.0
"""Adapters of other people: given to a call, registered, or offered by a package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

import vlmprune
from vlmprune.cli import app, verify
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.hooks.sequence.cache import cache_name
from vlmprune.models import _REGISTERED, _TABLE, GROUP, Adapter, adapter_for, families
from vlmprune.models.declared import declare_family
from vlmprune.testing.conformance import Subject, all_checks, generate, run_check, shared_model
from vlmprune.testing.families import FAMILIES, llava
from vlmprune.testing.families.base import Family
from vlmprune.testing.families.layouts import Layout
from vlmprune.testing.tiny import tiny_inputs, tiny_model

INPUTS = tiny_inputs("llava", images=(1, 2, 0))


class Seeing(nn.Module):
    """A multimodal model in the style of code that comes with a checkpoint: parts under names of its own."""

    def __init__(self, parts: Any, image_id: int) -> None:
        super().__init__()
        self.eyes, self.bridge, self.brain = (
            parts.vision_tower,
            parts.multi_modal_projector,
            parts.language_model,
        )
        self.image_id = image_id

    def get_input_embeddings(self) -> nn.Module:
        return self.brain.get_input_embeddings()

    def look(self, photos: Tensor) -> list[Tensor]:
        hidden = self.eyes(photos, output_hidden_states=True).hidden_states[-2]
        return list(self.bridge(hidden[:, 1:]))

    def forward(self, input_ids: Tensor, photos: Tensor | None = None, **kwargs: Any) -> Any:
        embeds = self.get_input_embeddings()(input_ids)
        if photos is not None:
            rows = torch.cat(self.look(photos))
            embeds = embeds.masked_scatter((input_ids == self.image_id)[..., None], rows)
        return self.brain(inputs_embeds=embeds, **kwargs)


class Remote(LlavaForConditionalGeneration):
    """The whole model: its forward and what generate hands to it."""

    def __init__(self, original: Any) -> None:
        super().__init__(original.config)
        self.model = Seeing(original.model, original.config.image_token_id)
        self.lm_head, self.generation_config = original.lm_head, original.generation_config
        self.config.model_type = "remote_vlm"

    def forward(self, input_ids: Tensor, photos: Tensor | None = None, **kwargs: Any) -> Any:
        kwargs.pop("logits_to_keep", None)
        output = self.model(input_ids, photos, **kwargs)
        output["logits"] = self.lm_head(output.last_hidden_state)
        return output

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        name = cache_name(kwargs)
        held = kwargs[name].get_seq_length() if kwargs.get(name) is not None else 0
        wanted = {key: kwargs.get(key) for key in ("attention_mask", "use_cache", name)}
        if held:
            return {"input_ids": input_ids[:, held:], **wanted}
        return {"input_ids": input_ids, "photos": kwargs.get("photos"), **wanted}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Photos are no argument of LLaVA's."""


@pytest.fixture
def remote() -> Any:
    return Remote(tiny_model("llava")).eval()


def declared() -> type[Adapter]:
    return declare_family(
        "remote_vlm", tower="eyes", projector="bridge", language_model="brain", encode="look", pixels="photos"
    )


def photos() -> dict[str, Tensor]:
    return {"photos" if name == "pixel_values" else name: value for name, value in INPUTS.items()}


@pytest.mark.parametrize(
    "spec", ["fastervlm@9", "divprune@9", "visionzip@12", "fastv@9", "fastervlm@20+fastv@9"]
)
def test_a_model_of_other_people_is_pruned_as_the_same_model_of_ours(remote: Any, spec: str) -> None:
    ours = tiny_model("llava")
    with vlmprune.prune(ours, spec):
        want = generate(ours, INPUTS)
    with vlmprune.prune(remote, spec, adapter=declared()) as run:
        found = generate(remote, photos())
    assert torch.equal(found, want) and run.last.pruned


def test_an_adapter_is_a_class_or_an_object_of_this_model(remote: Any) -> None:
    made = declared()(remote)
    assert adapter_for(remote, made) is made and adapter_for(remote, declared()).model is remote
    with pytest.raises(SpecError, match="was made of another model"):
        adapter_for(tiny_model("llava"), made)
    with pytest.raises(SpecError, match="expected a subclass of"):
        vlmprune.prune(remote, "random@9", adapter=dict)


def test_a_path_that_leads_nowhere_is_named(remote: Any) -> None:
    wrong = declare_family("remote_vlm", tower="ears", projector="bridge", language_model="brain")
    with pytest.raises(SpecError, match="says 'ears', but Seeing has no such part"):
        vlmprune.prune(remote, "random@9", adapter=wrong)


def test_a_registered_family_is_found_by_its_type(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_REGISTERED, "remote_vlm", declared())
    assert "remote_vlm" in families()
    with vlmprune.prune(remote, "fastervlm@9") as run:
        generate(remote, photos())
    assert run.last.realised_tokens == [9, 9, 9]


def test_what_can_be_registered() -> None:
    kind = declared()
    try:
        assert vlmprune.register_family("remote_vlm")(kind) is kind
        assert vlmprune.register_family("remote_vlm")(kind) is kind  # a module that is loaded again
        with pytest.raises(SpecError, match="has an adapter already"):
            vlmprune.register_family("remote_vlm")(type("Other", (Adapter,), {}))
    finally:
        _REGISTERED.pop("remote_vlm", None)
    with pytest.raises(SpecError, match="has an adapter already"):
        vlmprune.register_family("llava")(type("Other", (Adapter,), {}))
    with pytest.raises(SpecError, match="expected a subclass"):
        vlmprune.register_family("other")(dict)


class Photos(Layout):
    """LLaVA's pictures under the name that the remote model gives them."""

    def images(self, *given: Any) -> dict[str, Tensor]:
        return {"photos": found["pixel_values"]} if (found := super().images(*given)) else {}

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        return {"photos": inputs["photos"][first : first + count]} if count else {}


def build(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> Any:
    return Remote(tiny_model("llava", layers=layers, **overrides))


TINY = Family("remote_vlm", "", Photos(), (("clip", "llama"),), llava.config, build=build)
Offered = declared()


@pytest.fixture
def given() -> Iterator[list[str]]:
    """Words of the command line that name the adapter and its tiny model; forgotten afterwards."""
    yield ["--adapter", f"{__name__}:Offered", "--tiny", f"{__name__}:TINY"]
    _REGISTERED.pop("remote_vlm", None)
    FAMILIES.pop("remote_vlm", None)
    shared_model.cache_clear()


def test_checks_run_on_a_model_that_its_author_builds(given: list[str]) -> None:
    family = verify._of_user(given[1], given[3])
    for name in ("cut_equals_hand_built", "batch_row_equals_alone"):
        result = run_check(name, all_checks()[name], Subject("fastervlm@9", family))
        assert result.status == "pass", result.detail


@pytest.mark.slow
def test_verify_runs_all_checks_on_it(given: list[str]) -> None:
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["verify", "fastervlm@9", "--json", *given])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    assert {one["family"] for one in results} == {"remote_vlm"} and len(results) == len(all_checks())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapter", "json:loads"], "belong together"),
        (["--adapter", "json:loads", "--tiny", "json:dumps"], "expected a vlmprune.testing.families.base"),
        (["--adapter", "nowhere:Adapter", "--tiny", "json:dumps"], "cannot be loaded"),
    ],
)
def test_what_verify_is_given_must_be_there(words: list[str], said: str) -> None:
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["verify", "random@9", *words])
    assert done.exit_code == 2 and said in done.stderr


def test_a_package_offers_an_adapter(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("remote_vlm", f"{__name__}:Offered", GROUP)
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: Offered)
    found = _TABLE.offers._replace(points={"remote_vlm": point})
    monkeypatch.setitem(_TABLE.__dict__, "offers", found)
    assert type(adapter_for(remote)) is Offered and "remote_vlm" in families()
    try:  # as a test of the package does, and verify
        assert vlmprune.register_family("remote_vlm")(Offered) is Offered
    finally:
        _REGISTERED.pop("remote_vlm", None)
    with pytest.raises(SpecError, match="has an adapter already"):
        vlmprune.register_family("remote_vlm")(type("Other", (Adapter,), {}))
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: 7)
    with pytest.raises(SpecError, match="expected a subclass"):
        adapter_for(remote)


def test_without_an_adapter_it_is_refused(remote: Any) -> None:
    with pytest.raises(UnsupportedError, match="'remote_vlm' is not supported"):
        vlmprune.prune(remote, "random@9")
