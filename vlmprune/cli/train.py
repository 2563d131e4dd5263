# SPDX-License-Identifier: Apache-2.0
"""``vlmprune train``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .screen import Json, plain, print_json, stdout

Patience = Annotated[
    int,
    typer.Option(help="End after so many times 50 steps without a gain on the other questions; 0: never."),
]
Parts = Annotated[
    int,
    typer.Option(help="Pieces that the questions of a step are read in, one after the other: less memory."),
]


def train(
    method: Annotated[
        str, typer.Argument(help="A method with trained weights: visionselector, rcp, dyvte or textmonkey.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="tiny, a folder, or an HF id.")],
    data: Annotated[str, typer.Option(help="shapes, or a file of lines {image, question, answer}.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the weights; a call again goes on.")],
    keep: Annotated[
        int | None,
        typer.Option(help="Visual tokens of a picture that it is trained at, 36 by default; none for dyvte."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Questions in a step.")] = 8,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    samples: Annotated[int, typer.Option(help="Questions to train on.")] = 600,
    dev: Annotated[int, typer.Option(help="Other questions, answered before and after.")] = 60,
    width: Annotated[
        int | None, typer.Option(help="Of what is trained; default half that of the model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the order.")] = 0,
    patience: Patience = 0,
    parts: Parts = 1,
    precision: Annotated[str, typer.Option(help="no, or bf16 for most of a pass.")] = "no",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1 or mps; cuda under torchrun: a GPU for each process.")
    ] = "cpu",
    as_json: Json = False,
) -> None:
    """Train the weights of a method for one model, which stays as it is; the same call goes on."""
    from ..models.loading import load
    from ..training.loop import Pace
    from ..training.processes import device_of, is_first
    from ..training.run import run, spec_of

    settings = Pace(steps, batch_size, lr, seed=seed, patience=patience, parts=parts, precision=precision)
    numbers: dict[str, Any] = {"keep": keep, "samples": samples, "dev": dev, "width": width}
    loaded, processor = load(model, device_of(device))
    screen = stdout()

    def note(step: int, loss: float) -> None:
        if not as_json and (step % 10 == 0 or step + 1 == steps):
            screen.print(plain(f"step {step + 1} of {steps}: loss {loss:.4f}"))

    facts: dict[str, Any] = run(method, loaded, processor, data, out, **numbers, settings=settings, note=note)
    if not is_first():
        return
    if as_json:
        print_json(facts)
        return
    found = facts["dev"]
    for name in [name for name in found if name not in ("questions", "keep")]:
        screen.print(plain(f"{name}: {found[name]:.3f} of {found['questions']} questions"))
    screen.print(plain(f"use it as {spec_of(method, out, found['keep'])}"))
