# SPDX-License-Identifier: Apache-2.0
"""Overlays: size, which pixels change and how, views, blocks, and every kind of picture."""

from __future__ import annotations

import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from vlmprune.core.keepmap import KeepMap, ScoreMap
from vlmprune.errors import SpecError
from vlmprune.viz.overlay import RIM, draw_keep, open_picture, ramp, view_box


def picture(width=96, height=64):
    x, y = np.meshgrid(np.linspace(40, 230, width), np.linspace(30, 220, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], axis=-1).astype(np.uint8))


def pixels(image):
    return np.asarray(image.convert("RGB"), dtype=int)


def test_kept_patches_are_untouched_inside_and_dropped_ones_darker_and_greyer():
    source, drawn = pixels(picture()), pixels(KeepMap([0, 5], 6, ((2, 3),)).draw(picture()))
    assert drawn.shape == source.shape
    inside = np.s_[3:29, 3:29]
    assert (drawn[inside] == source[inside]).all()
    dropped = np.s_[34:62, 3:60]  # tokens 3 and 4
    assert (drawn[dropped].sum(-1) < 0.6 * source[dropped].sum(-1)).all()
    assert np.ptp(drawn[dropped], axis=-1).mean() < 0.2 * np.ptp(source[dropped], axis=-1).mean()


def test_merged_patches_stay_in_colour_and_dropped_ones_do_not():
    joins = [0, 0, -1, -1, -1, -1]
    source, drawn = pixels(picture()), pixels(KeepMap([0], 6, ((2, 3),), joins=joins).draw(picture()))
    merged, dropped = np.s_[3:29, 36:60], np.s_[34:62, 3:60]  # token 1, tokens 3 and 4
    assert (drawn[merged].sum(-1) > source[merged].sum(-1)).all()
    assert (drawn[dropped].sum(-1) < 0.6 * source[dropped].sum(-1)).all()


def test_the_outline_runs_round_the_kept_region_and_not_through_it():
    drawn = pixels(KeepMap([0, 1], 6, ((2, 3),)).draw(picture()))
    rim = (drawn == RIM).all(-1)
    assert rim[31, 5:55].all() and rim[5:25, 63].all()
    assert not rim[3:28, 31:33].any()
    assert not rim[33:].any()


def test_patches_of_few_pixels_are_shown_without_an_outline():
    tiny = KeepMap([0], 64, ((8, 8),)).draw(picture(16, 16))
    assert not (pixels(tiny) == RIM).all(-1).any()
    assert (pixels(tiny)[:2, :2] == pixels(picture(16, 16))[:2, :2]).all()


def test_keeping_everything_changes_nothing():
    assert (pixels(KeepMap(range(6), 6, ((2, 3),)).draw(picture())) == pixels(picture())).all()


@pytest.mark.parametrize(
    "size, box", [((96, 64), (16, 0, 80, 64)), ((64, 97), (0, 16, 64, 80)), ((5, 5), (0, 0, 5, 5))]
)
def test_the_centre_view_is_the_largest_centred_square(size, box):
    assert view_box(size, "center") == box
    assert view_box(size, "stretch") == (0, 0, *size)
    with pytest.raises(SpecError, match="center"):
        view_box(size, "centre")


def test_the_margin_of_a_centre_view_looks_like_neither_kept_nor_dropped():
    drawn = pixels(KeepMap([0], 4, ((2, 2),), view="center").draw(picture()))
    margin, dropped = drawn[:, :15], drawn[36:60, 52:76]
    assert margin.min() > dropped.max()
    assert (drawn[2:28, 18:44] == pixels(picture())[2:28, 18:44]).all()


def test_blocks_become_panels_side_by_side():
    kept = KeepMap([0, 4], 5, ((2, 2), (1, 1)))
    drawn = kept.draw(picture())
    assert drawn.height == 64 and drawn.width == 2 * 96 + 4
    assert (pixels(drawn)[:, 96:100] == 255).all()
    assert (pixels(drawn)[:, 100:] == pixels(picture())).all()
    assert (pixels(drawn)[:, :96] == pixels(KeepMap([0], 4, ((2, 2),)).draw(picture()))).all()


MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "I;16",
    "F",
]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_can_be_drawn(mode):
    grey = Image.linear_gradient("L")
    source = {
        "P": lambda: grey.convert("RGB").quantize(16),
        "LAB": lambda: Image.new("LAB", (256, 256), (128, 0, 0)),
        "La": lambda: grey.convert("LA").convert("La"),
        "RGBa": lambda: grey.convert("RGBA").convert("RGBa"),
        "PA": lambda: grey.convert("P").convert("PA"),
        "HSV": lambda: grey.convert("RGB").convert("HSV"),
        "I;16": lambda: Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
        "YCbCr": lambda: grey.convert("RGB").convert("YCbCr"),
    }.get(mode, lambda: grey.convert(mode))()
    assert source.mode == mode
    drawn = KeepMap([1], 4, ((2, 2),)).draw(source)
    assert drawn.mode == "RGB" and drawn.size == (256, 256)
    if mode not in ("1", "P", "PA", "LAB"):  # those hold another picture than the gradient
        assert abs(pixels(open_picture(source)) - pixels(grey)).max() <= 2
    assert open_picture(Image.new("LAB", (1, 1), (0, 0, 0))).getpixel((0, 0)) != (255, 255, 255)


def test_transparency_is_shown_on_white():
    assert open_picture(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_a_path_is_read_and_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    picture(40, 20).save(tmp_path / "a.png", exif=exif)
    assert KeepMap([0], 4, ((2, 2),)).draw(tmp_path / "a.png").size == (20, 40)
    assert KeepMap([0], 4, ((2, 2),)).draw(str(tmp_path / "a.png")).size == (20, 40)


NO_PICTURES = [
    Image.new("RGB", (0, 5)),
    Image.new("L", (5, 0)),
    7,
    np.zeros((4, 4, 3)),
    "no/such/file.png",
    __file__,
]


@pytest.mark.parametrize("wrong", NO_PICTURES)
def test_what_is_no_picture_is_a_spec_error(wrong):
    with pytest.raises(SpecError, match=r"image|picture"):
        KeepMap([0], 4, ((2, 2),)).draw(wrong)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2), (7, 300)])
def test_pictures_smaller_than_the_grid_keep_their_size(size):
    for view in ("stretch", "center"):
        assert KeepMap([0, 9], 576, ((24, 24),), view=view).draw(Image.new("RGB", size, "red")).size == size
        assert (
            ScoreMap(torch.rand(576), ((24, 24),), view=view).draw(Image.new("RGB", size, "red")).size == size
        )


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(SpecError, match=r"shape \(5,\); grids \(\(2, 2\),\) expect \(4,\)"):
        draw_keep(picture(), ((2, 2),), np.ones(5))


def test_the_ramp_grows_lighter_all_along():
    luminance = ramp(np.linspace(0, 1, 256)) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all() and luminance[0] < 20 and luminance[-1] > 230


def test_heat_is_brighter_where_scores_are_higher_and_flat_scores_draw_flat():
    flat_grey = Image.new("L", (80, 40), 128)
    drawn = pixels(ScoreMap(torch.arange(8.0), ((2, 4),)).draw(flat_grey)).sum(-1)
    means = [drawn[20 * r : 20 * r + 20, 20 * c : 20 * c + 20].mean() for r in range(2) for c in range(4)]
    assert means == sorted(means) and len(set(means)) == 8
    assert np.ptp(pixels(ScoreMap(torch.ones(8), ((2, 4),)).draw(flat_grey)), axis=(0, 1)).max() == 0


def test_strengths_outside_zero_to_one_are_refused():
    with pytest.raises(SpecError, match=r"alpha=1\.5"):
        ScoreMap(torch.rand(4), ((2, 2),)).draw(picture(), alpha=1.5)
    with pytest.raises(SpecError, match="dim=-1"):
        KeepMap([0], 4, ((2, 2),)).draw(picture(), dim=-1)


# --- large pictures, many blocks, and no picture --------------------------------------------------


def test_a_drawing_is_bounded_and_an_argument_lifts_the_bound():
    kept, large = KeepMap([0, 3], 4, ((2, 2),)), picture(3000, 1500)
    assert kept.draw(large).size == (2000, 1000)
    assert kept.draw(large, max_side=300).size == (300, 150)
    assert kept.draw(large, max_side=None).size == large.size
    assert ScoreMap(torch.rand(4), ((2, 2),)).draw(large.rotate(90, expand=True)).size == (1000, 2000)
    assert kept.draw(picture()).size == (96, 64)  # never enlarged


@pytest.mark.parametrize("blocks", [2, 5, 40, 160])
def test_panels_side_by_side_fit_together(blocks):
    drawn = KeepMap([0], grids=((2, 2),) * blocks).draw(picture(900, 600))
    assert drawn.width <= 2000 and drawn.width > 0.8 * min(2000, 900 * blocks)


@pytest.mark.parametrize("max_side", [0, -1, 1.5, True, "big"])
def test_a_bound_that_is_none_is_refused(max_side):
    with pytest.raises(SpecError, match="max_side"):
        KeepMap([0], 4, ((2, 2),)).draw(picture(), max_side=max_side)


def test_more_blocks_than_can_be_seen_and_canvases_past_all_memory_are_refused():
    many = KeepMap([0], grids=((1, 1),) * 60_000)
    with pytest.raises(SpecError, match="60000 blocks of tokens do not fit into 2000 pixels"):
        many.draw(picture())
    with pytest.raises(SpecError, match=r"would have [0-9,]+ pixels; expected at most 268,435,456"):
        many.draw(picture(), max_side=None)


def test_strips_leave_no_seams(monkeypatch):
    """Outlines, stripes and colours do not depend on how a picture is cut for the computation."""
    kept = KeepMap([0, 5, 6, 9, 20], grids=((5, 5),), view="center")
    scores = ScoreMap(torch.rand(25, generator=torch.Generator().manual_seed(0)), ((5, 5),), view="center")
    deep = Image.fromarray(np.linspace(-3, 900, 700 * 500).reshape(500, 700).astype(np.float32))

    def drawings():
        return [kept.draw(picture(700, 500)), scores.draw(picture(500, 700)), kept.draw(deep, max_side=350)]

    whole = drawings()
    monkeypatch.setattr("vlmprune.viz.overlay._STRIP", 2000)
    for one, other in zip(whole, drawings(), strict=True):
        assert (pixels(one) == pixels(other)).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "I;16", "F"])
def test_a_reduced_picture_looks_like_the_whole_one(mode):
    shades = np.asarray(Image.radial_gradient("L").resize((1024, 512)))
    grey = Image.fromarray(shades)
    source = {
        "I;16": lambda: Image.fromarray(shades.astype(np.uint16) * 257),
        "F": lambda: grey.convert("F"),
        "P": lambda: grey.convert("RGB").quantize(64),
    }.get(mode, lambda: grey.convert(mode))()
    small, expected = (
        pixels(open_picture(source, 128)),
        pixels(open_picture(source).resize((128, 64), Image.Resampling.BOX)),
    )
    assert small.shape == (64, 128, 3) and abs(small - expected).mean() < 3


@pytest.mark.parametrize(("mode", "name"), [("1", "a.png"), ("L", "a.jpg")])
def test_a_huge_file_is_drawn_in_little_memory_and_without_a_warning(tmp_path, mode, name):
    Image.new(mode, (12_000, 9_000), 255).save(tmp_path / name)
    kept = KeepMap(range(288), grids=((24, 24),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracemalloc.start()  # numpy's memory; Pillow holds the picture itself, a byte for each pixel
        drawn = kept.draw(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert drawn.size == (2000, 1500) and peak < 300e6


def test_a_picture_of_too_many_pixels_is_one_clear_error(tmp_path, monkeypatch):
    picture(300, 200).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.raises(
        SpecError, match=r"'.*a.png' is a picture of too many pixels; expected at most 40,000"
    ):
        open_picture(tmp_path / "a.png")


def test_a_url_is_not_taken_for_a_file():
    with pytest.raises(SpecError, match=r"'https://a\.org/b\.png' is a URL.*download it"):
        open_picture("https://a.org/b.png")


def test_a_map_draws_its_own_picture_or_a_grey_canvas_of_its_shape():
    own = ScoreMap(torch.rand(6), ((2, 3),), image=picture())
    assert (pixels(own.keep(2).draw()) == pixels(own.keep(2).draw(picture()))).all()
    assert (pixels(own.draw()) == pixels(own.draw(picture()))).all()
    bare = KeepMap([0], 6, ((2, 3),))
    assert (
        bare.draw().size == (480, 320)
        and len(np.unique(pixels(bare.draw())[40:100, 40:120].reshape(-1, 3), axis=0)) == 1
    )
