# SPDX-License-Identifier: Apache-2.0
"""``vlmprune calibrate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .screen import Json, plain, print_json, stdout


def calibrate(
    method: Annotated[
        str, typer.Argument(help="A method with settings of one model: fitprune or adaptinfer.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="tiny, a folder, or an HF id.")],
    data: Annotated[str, typer.Option(help="shapes, or a file of lines {image, question, answer}.")],
    samples: Annotated[int, typer.Option(help="Questions to look at.")] = 16,
    percent: Annotated[
        float, typer.Option(help="fitprune: share of the FLOPs of visual tokens to save, in percent.")
    ] = 60.0,
    layers: Annotated[int, typer.Option(help="adaptinfer: at most so many layers.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Find out settings of a method for one model, and print the spec that uses them."""
    # here, since they import torch, and a command line must start fast
    from ..models.loading import load
    from ..training.calibrate import check_calibrated, spec_for
    from ..training.data import read_data

    # before the model is loaded, which takes long
    check_calibrated(method)
    # no others are set apart: nothing is measured here
    asked = read_data(data, samples, 0).train
    loaded, processor = load(model, device)
    wanted: Any = percent if method == "fitprune" else layers
    spec = spec_for(method, loaded, processor, asked, wanted)
    if as_json:
        print_json({"method": method, "model": model, "samples": len(asked), "spec": spec})
    else:
        stdout().print(plain(spec))
