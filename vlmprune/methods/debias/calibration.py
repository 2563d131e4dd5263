# SPDX-License-Identifier: Apache-2.0
"""Calibration: average the scores of a method per place, fit the trend, and store it for one model.

The trend is a function of x = i / N, so that one sigma serves every number N of patches.
Provenance: written from a description of the paper; the official release has no fitting code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.budget import Budget
from ...core.combine import act_as
from ...core.method import CutPoint, Method, What, needs
from ...core.tokens import VisualTokens
from ...errors import SpecError
from ...registry import option_fields
from ...spec import Part
from .fit import fit_exponential
from .trend import STEEPEST

FORMAT = {"format": "vlmprune.calibration", "version": 1}
_ATTENTION: tuple[What, ...] = ("text_attention", "cls_attention", "received_attention")
# what decides the shape of attention and is written alike by all versions of transformers
_PARTS = ("", "text_config", "vision_config")
_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "image_size",
    "patch_size",
    "vision_feature_layer",
    "vision_feature_select_strategy",
)


@dataclass(frozen=True)
class Calibration:
    """A trend and what it was fitted on.

    Args:
        sigma, mu: of the fit.
        base: spec of the method whose scores were averaged, without its budget.
        tokens: places, that is patches per picture.
        pictures, samples: how many were averaged.
        model: last part of the name the model was loaded by.
        config: hash of what its config says about its shape.
    """

    sigma: float
    mu: float
    base: str
    tokens: int
    pictures: int
    samples: int
    model: str
    config: str

    def save(self, path: str | Path) -> None:
        """Write JSON that carries its own hash."""
        content = {**FORMAT, **asdict(self)}
        Path(path).write_text(
            json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what ``save`` wrote, refusing files that were changed since."""
        make = "make one with vlmprune.methods.debias.calibrate"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SpecError(f"calibration file {str(path)!r} cannot be read: {error}; {make}") from error
        names = {field.name for field in fields(cls)}
        if (
            not isinstance(content, dict)
            # other keys, or another format or version
            or content.keys() != {*FORMAT, *names, "sha256"}
            or any(content[name] != value for name, value in FORMAT.items())
        ):
            raise SpecError(f"{str(path)!r} is not a calibration file of version {FORMAT['version']}; {make}")
        # the hash is over all but itself: pop comes first
        if content.pop("sha256") != _digest(content):
            raise SpecError(
                f"calibration file {str(path)!r} was changed since it was written: its hash does not fit; "
                f"{make}"
            )
        if not (isinstance(content["sigma"], float) and abs(content["sigma"]) <= STEEPEST):
            raise SpecError(
                f"{str(path)!r} has sigma={content['sigma']!r}; expected a number from -{STEEPEST} to "
                f"{STEEPEST}; {make}"
            )
        return cls(**{name: content[name] for name in names})

    def check(self, config: Any, path: str) -> None:
        """Raise unless this was calibrated on the model with this config."""
        model, shape = identity(config)
        if (model, shape) != (self.model, self.config):
            raise SpecError(
                f"{path!r} was calibrated on model {self.model!r} (config {self.config[:12]}), this is "
                f"{model!r} ({shape[:12]}); a trend holds for one model: calibrate on this one"
            )


def identity(config: Any) -> tuple[str, str]:
    """(name, hash of its shape) of the model with this config."""
    # "" stands for the config itself
    parts = {part: getattr(config, part, None) if part else config for part in _PARTS}
    shape = {part: {key: getattr(value, key, None) for key in _KEYS} for part, value in parts.items()}
    return Path(str(getattr(config, "_name_or_path", "") or "")).name, _digest(shape)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_ranks_by_attention(inner: Method) -> None:
    """Raise unless the tokens that a method keeps are those of its highest attention scores."""
    works = "take a method that does, such as fastv, pyramiddrop, sparsevlm or fastervlm"
    if inner.wraps:
        raise SpecError(f"{inner.name!r} is a wrapper itself and cannot be debiased; {works}")
    if type(inner).score is Method.score or not any(needs(inner, what) for what in _ATTENTION):
        raise SpecError(f"method {inner.name!r} has no attention score to debias; {works}")
    # merges, but cannot be told which tokens to keep
    ranks_itself = inner.kind() == "merge" and type(inner).merge_ranked is Method.merge_ranked
    if inner.kind() == "select" or ranks_itself:
        raise SpecError(
            f"method {inner.name!r} does not let its tokens be ranked by a corrected score; {works}"
        )


def text_of(method: Method) -> str:
    """The spec of a method without a budget, with the options that are not at their defaults."""
    given = {option: getattr(method, option.name) for option in option_fields(type(method))}
    changed = [(option.name, value) for option, value in given.items() if value != option.default]
    return str(Part(method.name, tuple(changed)))


@dataclass(frozen=True, eq=False)
class Recorder(Method):
    """Scores as its inner method does and records it; inside the language model it cuts once, by one token.

    Args:
        inner: the method that is recorded.
        budget: of that method; without one it is taken for a method that needs none.
        seen: (N,) scores of every picture.
        models: identity of the model, once for every call.
    """

    inner: Method
    budget: Budget | None = None
    seen: list[Tensor] = field(default_factory=list)
    models: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # gates and repairs would add to the one cut
        act_as(self, self.inner, but=("kind", "cuts", "gated", "repairs"))
        object.__setattr__(self, "budgeted", self.budget is not None)

    def cuts(self, depth: int, budget: Budget | None, count: int) -> tuple[CutPoint, ...]:
        # scores are asked for only where something is cut, and one token is the least
        return (replace(self.inner.cuts(depth, budget, count)[0], keep=max(1, count - 1)),)

    def check_model(self, config: Any) -> None:
        # the one place where a method sees the config
        self.models.append(identity(config))

    def score(self, tokens: VisualTokens) -> Tensor:
        scores = self.inner.score(tokens)
        self.seen.extend(scores.double().cpu())
        return scores


def calibrate(model: Any, inputs: Iterable[Mapping[str, Any]], base: Any, path: str | Path) -> Calibration:
    """Fit the trend of a method's scores on a model, averaged per place over pictures, and write it to a
    file.

    Args:
        model: the model that the trend shall be divided out on.
        inputs: what the model's processor returns, one per sample; some hundred neutral pictures, never those
            of a test set.
        base: spec or object of the method whose scores are averaged, such as ``"fastv@64"``.
        path: of the file, ending in .json; given to ``debias(trend='...')`` afterwards.
    """
    # the verbs load methods by name: at the top of this file that would be a cycle
    from ...api import prune, resolve, score

    if not str(path).endswith(".json"):
        raise SpecError(f"path {str(path)!r} does not end in .json; expected the name of a calibration file")
    method, budget, _ = resolve(base, need_keep=False)
    check_ranks_by_attention(method)
    recorder, samples = Recorder(method, budget), 0
    for sample in inputs:
        samples += 1
        # no language model has to run for these
        if method.slot == "before_lm":
            score(model, sample, recorder)
            continue
        with torch.no_grad(), prune(model, recorder, keep=budget):
            model(**sample)
    lengths = sorted({len(scores) for scores in recorder.seen})
    if len(lengths) != 1:
        raise SpecError(
            f"{samples} samples hold pictures of {lengths} tokens; expected pictures of one size to average"
        )
    mean = torch.stack(recorder.seen).mean(0).numpy()
    mu, sigma = fit_exponential(mean)
    if abs(sigma) > STEEPEST:
        raise SpecError(
            f"the mean of {len(recorder.seen)} pictures has no smooth trend: sigma={sigma:.3g}, expected "
            f"-{STEEPEST} to {STEEPEST}; average more pictures"
        )
    found = Calibration(
        sigma, mu, text_of(method), lengths[0], len(recorder.seen), samples, *recorder.models[-1]
    )
    found.save(path)
    return found
