# SPDX-License-Identifier: Apache-2.0
"""The verbs: prune, attach, detach, score, select, reduce."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .checks import one_of
from .core.combine import check_scope
from .core.keepmap import Picture, Replay, ScoreMap
from .core.method import Merged, Method, Positions, needs_of
from .core.reduce import Reduced, reduce_tokens
from .core.select import choose
from .core.tokens import VisualTokens
from .errors import InvariantError, SpecError, UnsupportedError, did_you_mean
from .hooks.patches import PatchedMethod
from .hooks.session import Session
from .hooks.vision.encode import left_of, run_encoder
from .hooks.vision.pictures import make_units, stack_units
from .models import Adapter, adapter_for
from .models.bare import is_tower, tower_tensors
from .spec import Budget, Spec, parse
from .tensors import given_tokens, own_indices, to_keep, without_model

POSITIONS: tuple[Positions, ...] = get_args(Positions)
log = logging.getLogger(__name__)


def prune(
    model: Any,
    method: str | Spec | Method,
    *,
    keep: int | float | str | Budget | None = None,
    positions: str | None = None,
    strict: bool = False,
    adapter: type[Adapter] | Adapter | None = None,
    frames: bool = False,
) -> Session:
    """Prune visual tokens inside an unmodified transformers model, as a context manager.

    Args:
        model: a loaded vision-language model.
        method: a spec such as ``"fastervlm@64"``, or a method object together with ``keep``.
        keep: int = tokens, float in (0, 1] = fraction; only where the spec has none.
        positions: "compact" re-counts positions after the cut, "original" leaves gaps; default as the method
            declares.
        strict: raise when an image holds fewer tokens than an absolute ``keep``, instead of keeping them all.
        adapter: what says where the parts of the model are, a subclass of ``vlmprune.models.Adapter``; for
            models that the package does not know.
        frames: the images of every prompt are the frames of one clip, in their order: a budget is spent on
            all of them together, ``/crop`` on each, and methods for clips may be used. For models whose clips
            are images to them, such as InternVL and SmolVLM.

    Examples:
        >>> with vlmprune.prune(model, "fastervlm@64") as run:  # doctest: +SKIP
        ...     ids = model.generate(**inputs, max_new_tokens=32)
        >>> print(run.last)  # doctest: +SKIP
    """
    wanted = _positions(positions)
    one_of("frames", frames, (True, False))
    plans, text = resolve_all(method, keep)
    found = adapter_for(model, adapter)
    for built, _ in plans:
        if built.slot != "inside_lm":
            built.kind()  # raises if the class implements no verb of its slot
        built.check_model(found.config)
        if built.clips and not frames and all(modality.name != "video" for modality in found.modalities):
            raise UnsupportedError(
                f"{built.name} reads the frames of one clip, but {found.model_type} takes images only; where "
                "the images of a prompt are the frames of one clip, say so by frames=True, or use a method "
                "for images, e.g. 'divprune@64'"
            )
    log.debug("%r for %s by the adapter of %s", text, type(model).__name__, found.model_type)
    return Session(found, plans, text, positions=wanted, strict=strict, frames=frames)


def _positions(given: object) -> Positions | None:
    if given is None:
        return None
    for known in POSITIONS:
        if isinstance(given, str) and given == known:
            return known
    near = did_you_mean(str(given), POSITIONS)
    raise SpecError(f"positions={given!r}; expected one of {list(POSITIONS)}.{near}")


def attach(model: Any, method: str | Spec | Method, **options: Any) -> Session:
    """Like ``prune``, but attached until ``handle.detach()``; ``handle.enabled = False`` turns it off."""
    return prune(model, method, **options).attach()


def detach(model: nn.Module) -> None:
    """Take off what is attached to a model, for a handle that was lost; harmless where nothing is."""
    held = (value for module in model.modules() for value in vars(module).values())
    patch = next((value for value in held if isinstance(value, PatchedMethod)), None)
    if patch is not None:
        patch.session.detach()


def resolve(
    method: str | Spec | Method, keep: Any = None, *, need_keep: bool = True
) -> tuple[Method, Budget | None, str]:
    """(method object, budget, spec text) where exactly one acting method makes sense."""
    plans, text = resolve_all(method, keep, need_keep=need_keep)
    if len(plans) != 1:  # a wrapper and what it wraps are one
        raise UnsupportedError(f"{text!r} combines {len(plans)} acting methods; give one of them here")
    return *plans[0], text


def resolve_all(
    method: str | Spec | Method, keep: Any = None, *, need_keep: bool = True
) -> tuple[list[tuple[Method, Budget | None]], str]:
    """Acting methods with their budgets, and the spec text, from whatever a user may give."""
    plans, text = _resolved(method, keep, need_keep)
    for built, _ in plans:
        if built.slot == "picture":
            raise UnsupportedError(
                f"{text!r} shrinks the picture before the processor reads it, so there is nothing to attach "
                f"to a model; use vlmprune.encode(model, processor, picture, question, prune={text!r}), or "
                f"`vlmprune run` and `vlmprune leaderboard`"
            )
        if built.slot == "answer":
            raise UnsupportedError(
                f"{text!r} asks the model a second time, so there is nothing to attach to it; call "
                "vlmprune.refine(model, processor, picture, question) inside `with vlmprune.prune(...)` of "
                "the other methods, or use `vlmprune leaderboard`"
            )
    return plans, text


def _resolved(
    method: str | Spec | Method, keep: Any, need_keep: bool
) -> tuple[list[tuple[Method, Budget | None]], str]:
    if isinstance(method, Replay):
        return [(method, Budget.of(method.keep if keep is None else keep))], "replay"
    if isinstance(method, Method):
        budget = None if keep is None else Budget.of(keep)
        name = method.name or type(method).__name__.lower()
        # inside the language model a schedule of the method's own may stand in for a budget
        needs_one = method.budgeted and method.counts == "budget" and method.slot != "inside_lm"
        if budget is None and needs_one and need_keep:
            raise SpecError(f"{name} needs a budget: give keep=64 (tokens) or keep=0.25 (fraction)")
        if budget is not None and not method.budgeted:
            raise SpecError(f"{name} takes no budget but keep={keep!r} was given; drop it")
        check_scope(method, budget)
        return [(method, budget)], name if budget is None else f"{name}@{budget}"
    if isinstance(method, type) and issubclass(method, Method):
        raise SpecError(f"{method.__name__} is a class; give an object, e.g. {method.__name__}()")
    spec = parse(method)
    if keep is not None:
        if any(part.budget is not None for part in spec.parts):
            raise SpecError(
                f"{str(spec)!r} has a budget and keep={keep!r} was given as well; give one of them"
            )
        spec = spec.with_keep(keep)
    return [(plan.method, plan.budget) for plan in spec.build(require_budget=need_keep)], str(spec)


def score(
    model: Any,
    inputs: Mapping[str, Any],
    method: str | Spec | Method,
    *,
    image: Picture | Sequence[Picture | None] | None = None,
) -> list[ScoreMap]:
    """Score the visual tokens of ``inputs`` without running the language model: one ScoreMap per image or
    frame.

    Args:
        model: a loaded model, or a bare ViT of timm with pixels (B, 3, H, W) as ``inputs``.
        inputs: what the processor returned.
        method: a spec or a method object that scores; a budget is not needed.
        image: the picture that ``inputs`` were made of, or a list of them in order, for the maps to draw.
    """
    return _with_pictures(_score(model, inputs, method), image)


def _score(model: Any, inputs: Mapping[str, Any], method: str | Spec | Method) -> list[ScoreMap]:
    built, _, text = resolve(method, need_keep=False)
    if built.slot != "before_lm":
        where = "inside the vision tower" if built.slot == "encoder" else "inside the language model"
        raise UnsupportedError(
            f"{text!r} acts {where}, where score cannot follow it; use prune(...) and read run.last.keep"
        )
    if built.kind() != "score":
        raise UnsupportedError(
            f"{text!r} chooses a set of tokens and gives no scores; use prune(...) and read run.last.keep, "
            "or select(...)"
        )
    if is_tower(model):
        return _score_tower(model, inputs, built, text)
    adapter = adapter_for(model)
    built.check_model(adapter.config)
    if not isinstance(inputs, Mapping):
        expected = f"what the processor returned, a mapping with {adapter.modalities[0].pixels!r}"
        raise SpecError(f"inputs is a {type(inputs).__name__}; expected {expected}")
    maps: list[ScoreMap] = []
    seen = 0  # pictures of earlier modalities
    for modality in adapter.modalities:
        if inputs.get(modality.pixels) is None:
            continue
        capture = adapter.capture(needs_of(built))
        _, (pictures,) = run_encoder(adapter, modality, inputs, [capture])  # one capture, one list
        pictures = left_of(adapter, modality, pictures, inputs)
        units = make_units(pictures, [[p] for p in range(len(pictures))], "image")  # one of each picture
        for number, unit in enumerate(units):
            tokens = stack_units([unit], pictures, needs_of(built), adapter.projector)
            with torch.no_grad():
                scores = finite_scores(built, tokens)[0].float().cpu()  # (N,)
            grids = unit.grids or ((1, unit.count),)  # not known: a row of tokens in reading order
            blank = ScoreMap(
                scores, grids=grids, method=text, view=pictures[number].view, index=seen + number
            )
            maps += _by_frame(blank) if pictures[number].frames and unit.grids else [blank]
        seen += len(pictures)
    if not maps:
        pixels = [modality.pixels for modality in adapter.modalities]
        raise SpecError(f"inputs hold no images: expected one of {pixels}, got {sorted(inputs)}")
    return maps


def _score_tower(model: Any, pixels: Any, method: Method, text: str) -> list[ScoreMap]:
    """Of a bare ViT: one map per picture."""
    tensors: dict[str, Any]
    tensors, grid = tower_tensors(model, pixels, method)
    rows = finite_scores(method, VisualTokens(**tensors, grids=(grid,))).float().cpu()  # (B, N)
    return [
        ScoreMap(row, grids=(grid,), method=text, view="stretch", index=number)
        for number, row in enumerate(rows)
    ]


def _by_frame(clip: ScoreMap) -> list[ScoreMap]:
    """The map of a clip as one map for each of its frames."""
    parts = clip.scores.split([rows * cols for rows, cols in clip.grids])
    return [
        replace(clip, scores=part, grids=(grid,), frame=frame)
        for frame, (part, grid) in enumerate(zip(parts, clip.grids, strict=True))
    ]


def _with_pictures(maps: list[ScoreMap], image: Picture | Sequence[Picture | None] | None) -> list[ScoreMap]:
    """The maps with the pictures that they are of; frames of a clip share one."""
    if image is None:
        return maps
    pictures = list(image) if isinstance(image, Sequence) and not isinstance(image, str) else [image]
    # not their number: the frames of a clip share an index
    count = maps[-1].index + 1
    if len(pictures) != count:
        raise SpecError(
            f"image holds {len(pictures)} pictures; expected {count}, one for each that inputs were made of"
        )
    return [replace(one, image=pictures[one.index]) for one in maps]


def finite_scores(method: Method, tokens: VisualTokens) -> Tensor:
    """(B, N) scores of a method, refused when they are not finite."""
    scores = method.score(tokens)
    if not bool(scores.isfinite().all()):
        raise InvariantError(
            f"{method.name} gave {int((~scores.isfinite()).sum())} scores that are not finite; check the "
            "model's activations"
        )
    return scores


def select(
    method: str | Spec | Method,
    keep: Any = None,
    *,
    grid: Any = None,
    tower: Any = None,
    pixels: Any = None,
    **tensors: Any,
) -> Tensor:
    """Choose tokens from plain tensors, or of a bare ViT of timm: ``keep_idx`` (B, K) int64, ascending.

    Where a method counts by itself, -1 stands behind the tokens of a unit that keeps fewer than others.

    Args:
        method: spec or method object.
        keep: budget, unless the spec has one.
        grid: (rows, cols) of the tokens, or a tuple of several blocks.
        tower, pixels: a ViT of timm and what it shall look at (B, 3, H, W), in place of ``grid`` and
            ``tensors``.
        tensors: fields of VisualTokens, e.g. ``features=(B, N, D)``, ``cls_attention=(B, H, N)``.

    Examples:
        >>> import torch, vlmprune
        >>> vlmprune.select("fastervlm", keep=2, cls_attention=torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
        tensor([[1, 3]])
    """
    built, budget, text = resolve(method, keep)
    without_model(built, text)
    if tower is not None:
        if tensors or grid is not None:
            raise SpecError(
                f"a tower and {sorted(tensors) or 'grid'} were given; give a tower with its pixels, or "
                "tensors"
            )
        tensors, grid = tower_tensors(tower, pixels, built)
    tokens = given_tokens("select", tensors, grid)
    built.check_unit(tokens.count)
    if (k := to_keep(built, budget, text, tokens)) is None:
        return own_indices(built, tokens)
    if k >= tokens.count:
        # a copy: rows of an expanded tensor are one memory, and whoever writes into one would change all
        return torch.arange(tokens.count, device=tokens.device).expand(tokens.batch, -1).clone()
    with torch.no_grad():
        result = choose(built, tokens, k)
    if isinstance(result, Merged):
        # merged rows have no place of their own, which is -1
        return torch.stack([row[row >= 0].sort().values for row in result.slots])
    return result


def reduce(method: str | Spec | Method, keep: Any = None, *, grid: Any = None, **tensors: Any) -> Reduced:
    """What a language model reads in place of plain tensors: ``rows`` (B, K, D), with ``keep_idx`` (B, K).

    Unlike ``select`` it gives the rows of merging methods too.

    Args:
        method: spec or method object.
        keep: budget, unless the spec has one.
        grid: (rows, cols) of the tokens, or a tuple of several blocks.
        tensors: fields of VisualTokens; ``features=(B, N, D)`` is always needed.

    Examples:
        >>> import torch, vlmprune
        >>> left = vlmprune.reduce("pool", keep=2, grid=(2, 2), features=torch.eye(4)[None])
        >>> left.rows.shape, left.keep_idx.shape
        (torch.Size([1, 2, 4]), torch.Size([1, 2]))
    """
    built, budget, text = resolve(method, keep)
    without_model(built, text)
    tokens = given_tokens("reduce", tensors, grid)
    tokens.need("features")
    built.check_unit(tokens.count)
    k = to_keep(built, budget, text, tokens)
    with torch.no_grad():
        return reduce_tokens(built, tokens, k)


__all__ = ["Adapter", "attach", "detach", "prune", "reduce", "resolve", "score", "select"]
