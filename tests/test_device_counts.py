# SPDX-License-Identifier: Apache-2.0
"""The pretended device counts what it should, and no method asks more of a device than the table says."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch

import vlmprune
from vlmprune.errors import SpecError
from vlmprune.hooks.patches import on_host
from vlmprune.registry import get
from vlmprune.testing.capabilities import method_names
from vlmprune.testing.conformance import generate
from vlmprune.testing.device import MixedDevices, PretendedDevice, moved, pretending
from vlmprune.testing.device_counts import CountRow, count_rows, read, write
from vlmprune.testing.tiny import tiny_inputs, tiny_model

TABLE = Path(__file__).parents[1] / "kernels" / "device_counts.csv"
CELLS = sorted({row.key[:3] for row in read(TABLE)})
SAMPLE = 24  # one cell in so many is counted by default, chosen by its name


def sampled(cell: tuple[str, str, str]) -> bool:
    return zlib.crc32("|".join(cell).encode()) % SAMPLE == 0


@pytest.fixture
def device():
    made = PretendedDevice()
    with pretending(made):
        yield made


WAITS = {
    "a number": lambda x: x.sum().item(),
    "a truth value": lambda x: bool(x.any()),
    "equality": lambda x: torch.equal(x, x + 1),
    "an index": lambda x: range(9)[x.argmax()],
    "a condition": lambda x: 1 if x[0] > 0 else 2,
    "whether it holds": lambda x: x[2] in x,
    "closeness": lambda x: torch.allclose(x, x + 1),
    "a list": lambda x: x.tolist(),
    "a copy": lambda x: x.cpu(),
    "places": lambda x: x.nonzero(),
    "a boolean mask": lambda x: x[x > 0],
    "writing by a mask": lambda x: x.index_put_((x > 0,), torch.zeros((), device="meta")),
    "different values": lambda x: x.unique(),
    "a loop over counts": lambda x: torch.ones(3, device="meta").repeat_interleave(x.long().abs()),
}


@pytest.mark.parametrize("what", WAITS)
def test_whatever_the_host_must_know_is_a_wait(device: PretendedDevice, what: str) -> None:
    x = device.away(torch.tensor([1.0, -2.0, 3.0]))
    WAITS[what](x)
    assert device.counts.waits == 1, device.counts.sites


def test_operations_are_launches_views_are_none_and_values_are_right(device: PretendedDevice) -> None:
    x = device.away(torch.arange(6.0))
    y = x.view(2, 3)[:, 1:].t()
    assert (device.counts.launches, device.counts.waits) == (0, 0)
    z = (y + 1).softmax(dim=0).argsort(dim=0)
    assert device.counts.launches == 3 and device.counts.bytes > 0
    assert z.tolist() == [[0, 0], [1, 1]]


def test_host_data_is_an_upload_and_devices_do_not_mix(device: PretendedDevice) -> None:
    x = device.away(torch.arange(4.0))
    torch.tensor([1, 2], device=x.device)
    torch.ones(3).to(x.device)
    x[torch.tensor([0, 2])]
    assert device.counts.uploads == 3, device.counts.sites
    with pytest.raises(MixedDevices, match=r"\(4,\) on the CPU"):
        x + torch.ones(4)
    assert (x + torch.tensor(1.0)).shape == (4,)  # a single number may come from the host


@pytest.mark.parametrize("spec", ["fastervlm@9", "fastv(layer=1)@9"])
def test_the_answer_is_that_of_the_cpu_and_nothing_stays_replaced(spec: str) -> None:
    names = torch.autocast, vlmprune.core.tokens.VisualTokens.__post_init__
    model, inputs = tiny_model(), tiny_inputs(images=(1, 2))
    with vlmprune.prune(model, spec):
        wanted = generate(model, inputs)
    device = PretendedDevice()
    away = moved(tiny_model(), device)
    given = {name: device.away(value) for name, value in inputs.items()}
    with pretending(device), vlmprune.prune(away, spec):
        ids = generate(away, given)
    assert ids.tolist() == wanted.tolist()
    assert names == (torch.autocast, vlmprune.core.tokens.VisualTokens.__post_init__)


def test_scores_made_on_the_cpu_meet_features_on_the_device() -> None:
    (row,) = [row for row in count_rows(["mmr+random@9"], ["llava"], ["one"]) if row.phase == "prefill"]
    assert (row.waits, row.uploads) == (0, 1)


def test_sizes_of_pictures_are_read_once_and_before_the_tower_runs(device: PretendedDevice) -> None:
    grid, pixels = device.away(torch.tensor([[1, 4, 6]])), device.away(torch.zeros(24, 3))
    read_here = on_host({"image_grid_thw": grid, "pixel_values": pixels, "image_sizes": None})
    assert read_here["image_grid_thw"].tolist() == [[1, 4, 6]] and read_here["pixel_values"] is pixels
    assert device.counts.waits == 1
    sizes, numbers = device.away(torch.tensor([[24, 36], [8, 9]])), device.away(torch.tensor([1, 1]))
    read_here = on_host({"image_sizes": sizes, "batch_num_images": numbers})
    waits = device.counts.waits
    assert read_here["image_sizes"].tolist() == [[24, 36], [8, 9]]
    assert read_here["batch_num_images"].tolist() == [1, 1]
    assert waits == 2  # one more, for both


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=[] if sampled(cell) else pytest.mark.slow, id="-".join(cell))
        for cell in CELLS
    ],
)
def test_no_method_asks_more_than_the_table_says(cell: tuple[str, str, str]) -> None:
    family, spec, batch = cell
    held = {row.phase: row for row in read(TABLE) if row.key[:3] == cell}
    for row in count_rows([spec], [family], [batch]):
        limit = held[row.phase]
        assert (row.launches <= limit.launches, row.waits <= limit.waits, row.uploads <= limit.uploads) == (
            (True,) * 3
        ), f"{row} asks more than {limit}; mend it, or run: vlmprune bench --count --out {TABLE.name}"


def test_the_table_has_every_method_and_one_prompt_never_waits_to_decode() -> None:
    rows = read(TABLE)
    names = {vlmprune.parse(row.spec).parts[0].name for row in rows if row.family == "llava"}
    # no weights are shipped for the counted models, and what is counted is a prompt with pictures
    assert names == {n for n in method_names() if not get(n).clips} - {"dense", "visionselector", "rcp"}
    waiting = [row for row in rows if (row.batch, row.phase) == ("one", "decode") and row.waits > 0]
    assert not waiting


def test_a_budget_that_cuts_nothing_is_refused() -> None:
    with pytest.raises(SpecError, match=r"cuts nothing of the tiny llava, whose pictures have \[36\] visual"):
        next(iter(count_rows(["fastervlm@64"], ["llava"], ["one"])))
    # what does not act in a small picture does in a tiled one
    rows = [*count_rows(["random@64"], ["llava_onevision"], ["one"])]
    assert [row.phase for row in rows] == ["prefill", "decode"]


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [CountRow("llava", "a(b=1)@9", "one", "decode", 1, 0, -2)]
    write(rows, tmp_path / "x.csv")
    assert read(tmp_path / "x.csv") == rows
    (tmp_path / "y.csv").write_text("a,b\n")
    with pytest.raises(SpecError, match="has the columns"):
        read(tmp_path / "y.csv")
