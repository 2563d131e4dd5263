# SPDX-License-Identifier: Apache-2.0
"""anyres="spatial", the layout of the FasterVLM and VisionZip authors for LLaVA-NeXT, built by hand from
tower and projector.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmprune
from vlmprune.errors import UnsupportedError
from vlmprune.testing.conformance import generate, shared_model
from vlmprune.testing.reference import Kept, greedy, merged_embeddings
from vlmprune.testing.tiny import tiny_inputs, tiny_model

SIZES = [(100, 190), (250, 70), (84, 168)]
SIDE = 6


@torch.no_grad()
def tower(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H, 37) attention of [CLS], (T, 37, C) feature layer, (T, 36, d) mean keys of all tiles, from an
    eager twin.
    """
    twin = tiny_model("llava_next")
    twin.set_attn_implementation("eager")
    keys: list[Tensor] = []
    block = [m for m in twin.model.vision_tower.modules() if hasattr(m, "self_attn")][2]
    hook = block.self_attn.k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
    output = twin.model.vision_tower(
        inputs["pixel_values"][0], output_hidden_states=True, output_attentions=True
    )
    hook.remove()
    return (
        output.attentions[2][:, :, 0],
        output.hidden_states[-2],
        keys[0].unflatten(-1, (4, 8)).mean(2)[:, 1:],
    )


def tiles_across(model: Any, size: tuple[int, int]) -> int:
    return sys.modules[type(model.model).__module__].get_anyres_image_grid_shape(
        size, model.config.image_grid_pinpoints, 84
    )[1]


def raster(tile: int, patch: int, across: int) -> tuple[int, int]:
    """(row, col) of a patch of detail tile ``tile`` (from 0) in the big image."""
    return tile // across * SIDE + patch // SIDE, tile % across * SIDE + patch % SIDE


def with_text(model: Any, inputs: dict[str, Tensor], visual: Tensor) -> Tensor:
    """(n, D): text before the image, visual rows, text after it."""
    dense = merged_embeddings(model, inputs)[0]
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    return torch.cat([dense[: places[0]], visual, dense[places[-1] + 1 :]])


def check_rows(model: Any, inputs: dict[str, Tensor], spec: str, visual: Tensor) -> Any:
    """The language model reads text and these visual rows, and answers from them; returns the report."""
    want, seen = with_text(model, inputs, visual), []
    layer = model.model.language_model.layers[0]

    def read(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hook = layer.register_forward_pre_hook(read, with_kwargs=True)
    with vlmprune.prune(model, spec) as run:
        try:
            ids = generate(model, inputs)[0]
        finally:
            hook.remove()
    assert seen[0][0].shape == want.shape
    torch.testing.assert_close(seen[0][0], want, rtol=0, atol=2e-5)
    kept = Kept(want[None], torch.arange(len(want))[None])
    assert ids.tolist() == greedy(model, kept, len(ids))
    assert run.last.realised_tokens == [len(visual)]
    return run.last


@pytest.mark.parametrize("size", SIZES)
def test_fastervlm(size: tuple[int, int]) -> None:
    """The best k of every tile, overview first, then the detail tiles as one picture in raster order, without
    newlines.
    """
    model, inputs = shared_model("llava_next", None, None), tiny_inputs("llava_next", images=(1,), size=size)
    attention, hidden, _ = tower(inputs)
    with torch.no_grad():
        rows = model.model.multi_modal_projector(hidden[:, 1:])  # (T, 36, D)
    kept = [sorted(scores.topk(7).indices.tolist()) for scores in attention[..., 1:].mean(1)]
    across = tiles_across(model, size)
    detail = sorted((raster(t - 1, p, across), t, p) for t in range(1, len(kept)) for p in kept[t])
    order = [(0, p) for p in kept[0]] + [(t, p) for _, t, p in detail]
    report = check_rows(
        model, inputs, "fastervlm(anyres=spatial)@7/crop", torch.stack([rows[t, p] for t, p in order])
    )
    width = across * SIDE
    assert report.keep[0].keep_idx.tolist() == kept[0] + [
        36 + row * width + col for (row, col), _, _ in detail
    ]
    assert report.keep[0].grids == ((6, 6), ((len(kept) - 1) // across * SIDE, width))


@torch.no_grad()
def visionzip_tile(
    attention: Tensor, hidden: Tensor, keys: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, list[int], Tensor]:
    """([CLS] row, dominant patches, (c, C) contextual rows) of one tile, before the projector."""
    best = sorted(attention[:, 1:].sum(0).topk(dominant).indices.tolist())
    rest = [p for p in range(36) if p not in best]
    targets = rest[:: len(rest) // contextual][:contextual]
    groups: dict[int, list[int]] = {target: [] for target in targets}
    for patch in (p for p in rest if p not in targets):
        likeness = [float(torch.cosine_similarity(keys[patch], keys[target], dim=0)) for target in targets]
        groups[targets[likeness.index(max(likeness))]].append(patch)
    patches = hidden[1:]
    merged = [
        patches[target] + (patches[members].mean(0) if members else 0) for target, members in groups.items()
    ]
    return hidden[0], best, torch.stack(merged)


@pytest.mark.parametrize("size", SIZES)
def test_visionzip(size: tuple[int, int]) -> None:
    """The overview as it is; then of the detail tiles the dominant patches in raster order, [CLS] rows,
    contextual rows.
    """
    model, inputs = shared_model("llava_next", None, None), tiny_inputs("llava_next", images=(1,), size=size)
    tiles = [visionzip_tile(*parts, dominant=7, contextual=2) for parts in zip(*tower(inputs), strict=True)]
    hidden, across = tower(inputs)[1], tiles_across(model, size)
    base, *details = tiles
    places = sorted((raster(t, p, across), t, p) for t, (_, best, _) in enumerate(details) for p in best)
    rows = [base[0], *hidden[0, 1:][base[1]], *base[2]]
    rows += [hidden[t + 1, 1 + p] for _, t, p in places]
    rows += [cls for cls, _, _ in details]
    rows += [row for _, _, context in details for row in context]
    with torch.no_grad():
        visual = model.model.multi_modal_projector(torch.stack(rows))
    check_rows(model, inputs, "visionzip(anyres=spatial,contextual=2)@10/crop", visual)


def test_a_batch_of_tiled_pictures_of_several_sizes_equals_each_alone() -> None:
    model, inputs = shared_model("llava_next", None, None), tiny_inputs("llava_next", images=(1, 0, 1))
    with vlmprune.prune(model, "fastervlm(anyres=spatial)@7/crop"):
        together = generate(model, inputs)
        for row, image in ((0, 0), (2, 1)):
            real = inputs["attention_mask"][row].bool()
            alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
            alone |= {name: inputs[name][image : image + 1] for name in ("pixel_values", "image_sizes")}
            assert torch.equal(generate(model, alone)[0], together[row])


@pytest.mark.parametrize("spec", ["fastervlm(anyres=spatial)@7", "visionzip(anyres=spatial)@20/total"])
def test_a_budget_that_is_not_per_tile_is_refused(spec: str) -> None:
    model, inputs = shared_model("llava_next", None, None), tiny_inputs("llava_next", images=(1,))
    with vlmprune.prune(model, spec), pytest.raises(UnsupportedError, match="/crop"):
        model(**inputs)


def test_more_tokens_than_the_prompt_has_places_are_refused() -> None:
    """Without un-padding there may be more patches than placeholders."""
    model, inputs = (
        shared_model("llava_next", None, None),
        tiny_inputs("llava_next", images=(1,), size=(100, 190)),
    )
    with (
        vlmprune.prune(model, "fastervlm(anyres=spatial)@35/crop"),
        pytest.raises(UnsupportedError, match="lower keep"),
    ):
        model(**inputs)


def test_pictures_of_one_crop_keep_the_layout_of_the_checkpoint() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    answers = []
    for spec in ("fastervlm(anyres=spatial)@9/crop", "fastervlm@9"):
        with vlmprune.prune(model, spec):
            answers.append(generate(model, inputs))
    assert torch.equal(*answers)
