# SPDX-License-Identifier: Apache-2.0
"""The entrance and the exit of the language model, whatever slots act in between.

Entrance: pictures are found in the merged sequence, and masks and positions are put into terms of the slots
really held. Exit: the output is expanded to the full length, and the cache learns what was cut. In between
transformers sees a consistent, shorter sequence and builds every mask itself, whatever the attention
implementation.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import CaptureError, InvariantError, UnsupportedError
from .patches import ATTACHED
from .sequence.cache import CacheState, adopt, cache_in, counting_layer, known, slots_held
from .sequence.compaction import Compaction
from .sequence.masks import ASKS_FOR_PLACES, TokenTypes
from .sequence.own_cuts import left_by_model, refuse_leftovers, take_columns
from .sequence.placement import Columns, Placement, place
from .sequence.text import told_apart
from .sequence.views import SequenceView, Views
from .state import ForwardState
from .vision.encode import left_of

if TYPE_CHECKING:
    from .adapter import Adapter, Modality


def take_pictures(state: ForwardState, adapter: Adapter, spec: str, kwargs: Mapping[str, Any]) -> Any:
    """Take pictures that were encoded before this forward.

    Returns what they come from, pixels or pictures; None without any.
    """
    source: Any = None
    for modality in adapter.modalities:
        pixels = kwargs.get(modality.pixels)
        if state.active and pixels is not None:
            if not (isinstance(pixels, Tensor) and pixels.ndim > 1 and pixels.numel()):
                # some families skip empty pixels and leave the placeholders as they are; what looks like
                # pixels is checked where it is encoded, since sizes on a device make the host wait
                adapter.check(kwargs, modality)
            source = pixels if source is None else source
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get(modality.name)
        if encoded is None or not state.active:
            continue
        held = getattr(encoded, ATTACHED, None)
        if held is None:
            raise CaptureError(
                f"the {modality.name} features of this call were not encoded while {spec!r} was attached (or "
                "were rebuilt since, as chunked prefill does); attach before encoding and leave "
                "prefill_chunk_size unset"
            )
        source = held if source is None else source
        state.pictures[modality.name] = held.pictures
        state.report.fire("encode")
    return source


def locate(state: ForwardState, adapter: Adapter, mask: Tensor | None) -> None:
    """Find the pictures of a forward in its merged sequence."""
    present = [modality for modality in adapter.modalities if state.pictures.get(modality.name)]
    if not present:
        return
    for modality in present:
        if modality.name in adapter.compresses:
            given = state.pictures[modality.name]
            left = left_of(adapter, modality, given, state.arguments)
            state.pictures[modality.name] = left
            if adapter.takes_columns and left != given:
                take_columns(state, placeholders(state, adapter, modality), left)
    visual = [placeholders(state, adapter, modality) for modality in present]
    batch, length = visual[0].shape
    valid = None
    # a mask that does not fit is refused where the views are opened
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] >= length:
        valid = mask[:, mask.shape[1] - length :].to(visual[0].device, torch.bool)
    state.columns = Columns.of(visual, valid)
    state.placements = [
        place(state.pictures[modality.name], state.columns, number, state.checks)
        for number, modality in enumerate(present)
    ]
    if adapter.checks_features:
        for placement in state.placements:
            require_features(state, adapter, placement)
    if state.reads_text:
        state.placements = [told_apart(state, placement) for placement in state.placements]
    pictures = [picture for placement in state.placements for picture in placement.pictures]
    report = state.report
    report.grids = [picture.grids if picture.left is None else picture.encoded for picture in pictures]
    report.left = [picture.left for picture in pictures]
    report.frames = [picture.frames for picture in pictures]
    report.views = [picture.view for picture in pictures]
    # whole in every layer, until a slot says otherwise
    report.kept = [None] * len(pictures)
    report.encoded_tokens = [picture.encoded_count for picture in pictures]
    report.dense_tokens = [picture.count for picture in pictures]
    report.realised_tokens = list(report.dense_tokens)
    report.layer_tokens = [[count] * adapter.depth for count in report.dense_tokens]


def require_features(state: ForwardState, adapter: Adapter, placement: Placement) -> None:
    """Require that the placeholders of pictures hold their features, in order."""
    embeds = state.embeds.detach()
    encoded = [placement.pictures[p].features.detach() for _, p, _ in placement.spans]
    here = embeds.flatten(0, 1)[placement.flat.to(embeds.device)]  # (S, D)
    expected = torch.cat(encoded).to(here.device, here.dtype)
    same = torch.zeros((), dtype=torch.bool)
    if here.shape == expected.shape:
        same = (here == expected).all() | here.isnan().any()  # of the model itself: a check of its own
    state.checks.require(
        same,
        lambda: InvariantError(
            f"the sequence of {adapter.model_type!r} does not hold the features of its pictures as they were "
            "encoded, so that tokens cannot be told from each other; it needs an adapter of its own: "
            "prune(model, spec, adapter=...)"
        ),
    )


def placeholders(state: ForwardState, adapter: Adapter, modality: Modality) -> Tensor:
    """(B, L) bool, placeholder columns of one modality."""
    token, device = adapter.token_id(modality), state.embeds.device
    if state.input_ids is not None:
        return (state.input_ids == token).to(device)
    embeds = state.given  # no ids: embeddings
    row = adapter.inner.get_input_embeddings()(torch.tensor(token, device=embeds.device))
    return (embeds == row).all(dim=-1).to(device)


def open_views(state: ForwardState, adapter: Adapter, kwargs: Mapping[str, Any]) -> Views:
    """One view per group of layers, all explicit: masks over held slots, and positions."""
    if kwargs.get("output_attentions") or getattr(adapter.language_model.config, "output_attentions", False):
        raise UnsupportedError(
            "output_attentions: the maps would speak of the sequence after the cut, and edited rows would be "
            "missing; read what was kept from run.last.keep, or ask for attention maps without pruning"
        )
    batch, new = state.embeds.shape[:2]
    device, cache_state = state.embeds.device, state.cache_state
    typed = adapter.text_type is not None
    mask = state.given_mask if typed else kwargs.get("attention_mask")
    if state.stays is not None:  # the model took columns out and left the positions of all
        kwargs = {**kwargs, "position_ids": None}
    elif cache_state is not None and cache_state.stays is not None:
        refuse_leftovers(state, adapter)
        mask = left_by_model(mask, cache_state.stays)
    state.unpadded = mask is None and (cache_state is None or cache_state.all_valid)
    maskless = state.unpadded and (new == 1 if cache_state is not None else batch == 1)
    before = slots_held(state.cache) if cache_state is None else cache_state.seen_with(state.cache)
    position_ids = positions_of(kwargs, before, batch, new, device)
    counted = state.counted and state.unpadded and position_ids.ndim == 2
    if maskless and cache_state is not None:
        asks = state.reads_held or "cache_position" in kwargs or ASKS_FOR_PLACES
        state.seen = int(before) if asks else known(before)
        static = cache_state.seen
        return Views([view.stepped(static, state.seen, position_ids, counted) for view in cache_state.views])
    seen = known(before)
    if seen is None:  # the width of a mask says it too
        seen = mask.shape[1] - new if isinstance(mask, Tensor) and mask.ndim == 2 else int(before)
    if cache_state is not None and isinstance(mask, Tensor) and seen < cache_state.seen:
        raise InvariantError(
            f"attention_mask has shape {tuple(mask.shape)}; expected a column for each token of the "
            f"conversation, of which {cache_state.seen} were read where pictures were cut"
        )
    state.seen, mask = seen, full_mask(mask, batch, seen, new, device)
    types = token_types(state, adapter, new) if typed and state.placements else None
    if cache_state is None:
        maskless, padding = maskless and types is None, (mask[:, :seen], mask[:, seen:])
        return Views([SequenceView(0, *padding, position_ids, None, maskless, counted, types=types)])
    return Views(
        [
            view.resumed(mask, cache_state.seen, seen, position_ids, types, counted)
            for view in cache_state.views
        ]
    )


def positions_of(
    kwargs: Mapping[str, Any], before: int | Tensor, batch: int, new: int, device: torch.device
) -> Tensor:
    """Position ids (..., B or 1, n) as given, or counted on from the tokens ``before`` this call."""
    given: Tensor | None = kwargs.get("position_ids")
    if given is None and isinstance(before, Tensor):
        return (torch.arange(new, device=device) + before)[None]
    if given is None:
        return torch.arange(int(before), int(before) + new, device=device)[None]
    if given.shape[-1] != new or given.shape[-2:-1] not in ((1,), (batch,)):
        raise InvariantError(f"position_ids has shape {tuple(given.shape)}; expected {(batch, new)}, as fed")
    return given


def full_mask(mask: Any, batch: int, seen: int, new: int, device: torch.device) -> Tensor:
    """(B, seen + n) bool, the padding mask of the whole conversation."""
    if mask is None:
        return torch.ones(batch, seen + new, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"attention_mask is {shape}; with pruned images pass the 2-D padding mask (batch, tokens) and "
            "let the model expand it"
        )
    if mask.shape != (batch, seen + new):
        raise InvariantError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {(batch, seen + new)}: {seen} tokens "
            f"seen before and {new} fed now"
        )
    return mask.to(device, torch.bool)


def token_types(state: ForwardState, adapter: Adapter, new: int) -> TokenTypes | None:
    """Types of the new tokens; families give those of the whole conversation or of what is fed."""
    given, text = state.given_types, adapter.text_type
    if given is None or text is None:
        return None
    untyped = new - given.shape[-1]
    if given.ndim != 2 or untyped > state.generated:
        raise InvariantError(
            f"{adapter.types} has shape {tuple(given.shape)}; expected a type for each of {new} tokens"
        )
    if untyped > 0:
        # drafts of assisted decoding stand behind a prompt, some without types of their own: they are text
        given = pad(given, (0, untyped), value=text)
    # the class's own: on the instance a session's patch stands in its place
    make = type(adapter.model).create_masks_for_generate
    return TokenTypes(given[:, -new:], text, make, adapter.model.config, adapter.types)


def shortened(state: ForwardState, adapter: Adapter, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the language model for the sequence as the first layers see it."""
    view, config = state.views.at(0), adapter.language_model.config
    changed = {
        **kwargs,
        "inputs_embeds": state.embeds,
        "position_ids": view.position_ids,
        # spelled out: gaps in positions would read as packed sequences
        "attention_mask": view.mask_of_all(config, state.embeds, state.cache),
    }
    if "cache_position" in kwargs:  # transformers before 5.5
        held = view.held.shape[1]
        changed["cache_position"] = torch.arange(held, view.width, device=state.embeds.device)
    return changed | followed(state, adapter, kwargs)


# keywords along the sequence that have a rule of their own, or that a decoder does not read (labels: Gemma 4
# hands on all that it is given); the last is followed where features are added
_KNOWN = ("inputs_embeds", "attention_mask", "position_ids", "cache_position", "labels", "visual_pos_masks")


def followed(state: ForwardState, adapter: Adapter, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments (B or 1, L, ...) that the adapter names, after the cut; others of this form are
    refused.
    """
    cuts = [compaction for layer, compaction in state.views.cuts if layer == 0]
    known = (*(_KNOWN if adapter.deepstack is not None else _KNOWN[:-1]), *(adapter.added or ()))
    batch, length = state.embeds.shape[0], state.views.columns
    found: dict[str, Any] = {}
    for name, value in kwargs.items():
        along = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == length
        if not cuts or name in known or not along or value.shape[0] not in (1, batch):
            continue
        if name not in adapter.aligned:
            raise UnsupportedError(
                f"{type(adapter.language_model).__name__} is given {name!r} of shape {tuple(value.shape)}, "
                f"something of each of {length} tokens, which the adapter of {adapter.model_type!r} does not "
                "name, so that it would not follow the cut; add it to the adapter's `aligned`, or run dense"
            )
        for compaction in cuts:
            value = compaction.along(value)
        found[name] = value
    if cuts and adapter.added is not None and kwargs.get(adapter.added[0]) is not None:
        found |= followed_features(cuts, adapter.added, kwargs)
    return found


def followed_features(
    cuts: Sequence[Compaction], names: tuple[str, str], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Columns of pictures (B, L, 1), and per layer the features (V, D) that are added there, after cuts."""
    columns: Tensor = kwargs[names[0]][..., 0]
    features: Mapping[int, Tensor] = kwargs[names[1]]
    for compaction in cuts:
        stays = compaction.kept[columns]  # (V,)
        features = {layer: rows[stays.to(rows.device)] for layer, rows in features.items()}
        columns = compaction.follow(columns)
    return {names[0]: columns[..., None], names[1]: features}


@torch.compiler.disable  # where something was cut, which is once per prompt
def leave(state: ForwardState, output: Any, owner: weakref.ref) -> None:
    """Expand the output to the full length and let the cache remember the cut."""
    if not hasattr(output, "last_hidden_state"):
        raise UnsupportedError(
            f"the language model returned a {type(output).__name__}; call the model with return_dict=True"
        )
    views, short = state.views, output.last_hidden_state
    all_layers = getattr(output, "hidden_states", None) is not None
    # most often the last column alone is read, which is that of the last kept one
    as_it_is = not all_layers and (state.logits == 1 or 0 < state.logits <= views.tail)
    hidden = short if as_it_is else at_full_length(views, short)
    # NaN where a check failed that nobody has read yet: no wrong answer looks right
    output.last_hidden_state = state.checks.poison(hidden)
    if all_layers:
        last = len(output.hidden_states) - 1
        output.hidden_states = tuple(
            views.expand(hidden, None if number == last else number - 1)
            for number, hidden in enumerate(output.hidden_states)
        )
    cache = cache_in(output)
    cache = state.cache if cache is None else cache
    if cache is not None:
        first = views.at(counting_layer(cache))
        # a static cache on a device is not asked whether it was written
        if known(slots_held(cache)) in (None, first.held.shape[1] + first.new.shape[1]):
            # text at the end may be cropped away; a device is not asked how much there is
            tail = views.tail if state.embeds.device.type == "cpu" else state.generated
            adopt(cache, remembered(state, tail, owner))
    state.report.fire("exit")


def at_full_length(views: Views, hidden: Tensor) -> Tensor:
    """The last hidden states (B, n, D) at every column; those of the last columns where the model made no
    others.
    """
    width = views.all[-1].new.shape[1]
    if hidden.shape[1] == width:
        return views.expand(hidden)
    # the last column alone is that of the last kept one, whatever was cut
    if hidden.shape[1] > max(views.tail, 1):
        raise UnsupportedError(
            f"the language model returned the last {hidden.shape[1]} of {width} columns, and a picture that "
            f"was cut ends {views.tail} columns before the end; ask for fewer logits (logits_to_keep)"
        )
    return hidden


def remembered(state: ForwardState, tail: int, owner: weakref.ref) -> CacheState:
    """What later calls must know of the slots that this one leaves in the cache, the last ``tail`` apart."""
    views = state.views
    frozen = [view.frozen(tail) for view in views.all]
    # nothing was filled up where all rows lost as many
    all_valid = state.unpadded and all([compaction.is_even for _, compaction in views.cuts])
    if not all_valid and state.embeds.device.type == "cpu":  # a device is not asked
        all_valid = all(bool(view.held.all()) for view in frozen)
    all_valid = all_valid and all([view.held.shape[1] > 0 for view in frozen])
    if state.seen is None:
        raise InvariantError(
            "this forward has no number of earlier tokens yet; expected it to be read where the merged "
            "sequence enters the language model, or later"
        )
    seen = state.seen + views.columns - tail
    return CacheState(seen, frozen, owner, all_valid, state.marks, state.notes, stays=state.stays)
