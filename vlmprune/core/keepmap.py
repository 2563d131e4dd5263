# SPDX-License-Identifier: Apache-2.0
"""ScoreMap and KeepMap: scores of the tokens of one image, and which of them were kept, as plain tensors."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checks import one_of
from ..errors import InvariantError, SpecError, VlmPruneError
from ..viz import VIEWS
from .budget import Budget
from .grid import boxes, union_area
from .owned import owned, owned_indices, owned_scores
from .replay import Replay
from .select import top_k

if TYPE_CHECKING:
    from PIL import Image

# most of one image: a file that says more is refused before memory is asked for
TOKENS, BLOCKS = 2**20, 2**16
NOTEBOOK_SIDE = 640  # pixels of the drawing in a notebook
Grids = tuple[tuple[int, int], ...]
PathName = str | PathLike[str]
Picture: TypeAlias = "Image.Image | PathName"
M = TypeVar("M", bound="_Map")


class _Map:
    """What both maps share: their place in the picture, files, and how they show themselves in a notebook."""

    grids: Grids
    view: str
    method: str
    index: int
    frame: int | None
    image: Picture | None

    def _settle(self, count: int | None) -> int:
        """Check the plain fields; return the tokens that the grids hold, which must be ``count`` if given."""
        try:
            blocks = len(self.grids)
            grids = tuple((operator.index(rows), operator.index(cols)) for rows, cols in self.grids[:BLOCKS])
        except (TypeError, ValueError, LookupError) as error:
            given = repr(self.grids)
            shown = given if len(given) < 200 else f"{given[:200]}..."
            raise SpecError(
                f"grids={shown}; expected one (rows, cols) per block, such as ((24, 24),)"
            ) from error
        held = sum(rows * cols for rows, cols in grids)
        if blocks > BLOCKS or held > TOKENS:
            most = f"expected at most {TOKENS:,} tokens in {BLOCKS:,} blocks of one image"
            raise InvariantError(
                f"{blocks:,} grids, the first {grids[0]}, hold {held:,} tokens or more; {most}"
            )
        if count not in (None, held) or not held or any(min(grid) < 1 for grid in grids):
            wanted = f"{count or 'some'} in blocks of at least 1 x 1"
            raise InvariantError(f"grids {_brief(grids)} hold {held} tokens; expected {wanted}")
        one_of("view", self.view, VIEWS)
        for name, kind in (("method", str), ("index", int), ("frame", int | None)):
            if not isinstance(getattr(self, name), kind):
                raise SpecError(f"{name}={getattr(self, name)!r}; expected {getattr(kind, '__name__', kind)}")
        object.__setattr__(self, "grids", grids)
        return held

    def __repr__(self) -> str:
        frame = "" if self.frame is None else f", frame {self.frame}"
        said = f"{self.method!r}, {self._counts()}, {_brief(self.grids)}, image {self.index}{frame}"
        return f"{type(self).__name__}({said})"

    def _counts(self) -> str:
        raise NotImplementedError

    def _repr_png_(self) -> bytes:
        from ..viz.notebook import png

        return png(self.draw(max_side=NOTEBOOK_SIDE))

    def _repr_html_(self) -> str:
        from ..viz.notebook import figure

        return figure(self.draw(max_side=NOTEBOOK_SIDE), repr(self))

    def draw(self, image: Picture | None = None, *, max_side: int | None = None) -> Image.Image:
        raise NotImplementedError

    def on(self: M, image: Picture | None) -> M:
        """The same map with this picture to draw on, as for ``run.last.keep[0].on(picture)``."""
        given: Any = self  # a dataclass, as all maps are
        made: M = replace(given, image=image)
        return made

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the only block."""
        if len(self.grids) != 1:
            raise SpecError(
                f"this image has {len(self.grids)} blocks of tokens, {_brief(self.grids)}, and no single "
                "grid; use .grids"
            )
        return self.grids[0]

    @property
    def boxes(self) -> Tensor:
        """(N, 4) float x0, y0, x1, y1 in [0, 1] of the view."""
        return boxes(self.grids)

    def save(self, path: PathName) -> None:
        """Write a ``.safetensors`` or ``.json`` file that ``load`` reads back, without the picture."""
        suffix = _suffix(path)
        values = {name: value for name, value in vars(self).items() if value is not None and name != "image"}
        fields = _stamp(type(self)) | values
        tensors: dict[str, Tensor] = {
            name: fields.pop(name) for name in ("keep_idx", "scores", "joins", "left") if name in fields
        }
        if suffix == ".json":
            lists = {name: tensor.tolist() for name, tensor in tensors.items()}
            Path(path).write_text(json.dumps(fields | lists) + "\n", encoding="utf-8")
        else:
            save_file(tensors, path, metadata={name: json.dumps(value) for name, value in fields.items()})

    @classmethod
    def load(cls: type[M], path: PathName) -> M:
        """Read what ``save`` wrote; nothing in the file is executed."""
        suffix = _suffix(path)
        if not Path(path).is_file():
            raise SpecError(f"no file at {str(path)!r}; expected the path of a saved {cls.__name__}")
        try:
            if suffix == ".json":
                body = json.loads(Path(path).read_text(encoding="utf-8"))
            else:
                with safe_open(path, framework="pt") as file:
                    body = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
                    body |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stamp = {name: body.pop(name, None) for name in ("format", "version")}
            if stamp != _stamp(cls):
                raise SpecError(f"it says {stamp}, expected {_stamp(cls)}")
            if "image" in body:  # a path that someone else chose would be opened by draw
                raise SpecError("it names a picture, which is never saved")
            return cls(**body)
        except (
            VlmPruneError,
            SafetensorError,
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise SpecError(
                f"{str(path)!r} is not a whole {cls.__name__} file: {error}. Write it again with save"
            ) from error


@dataclass(frozen=True, eq=False, repr=False)
class ScoreMap(_Map):
    """Scores of the tokens of one image; higher is kept.

    Args:
        scores: (N,) finite, kept as float32 on the CPU.
        grids: (rows, cols) of the blocks the N tokens form one after the other, in raster order.
        method: the spec that scored.
        view: what the blocks cover: "stretch", the whole picture; "center", its largest centred square
            (resize, then crop).
        index: which image of the call.
        frame: which frame of a video, or None.
        image: the picture, or its path, for ``draw``; it is not saved.
    """

    scores: Tensor
    grids: Grids
    method: str = ""
    view: str = "stretch"
    index: int = 0
    frame: int | None = None
    image: Picture | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", owned_scores(self.scores))
        self._settle(len(self))

    def __len__(self) -> int:
        return self.scores.shape[0]

    def keep(self, keep: int | float | str | Budget) -> KeepMap:
        """Keep the highest scores: a count of tokens or a fraction of them; the lower index wins ties."""
        budget = Budget.of(keep)
        if budget.scope != "image":
            raise SpecError(
                f"budget {budget} has scope {budget.scope!r}; a score map is one image: give a plain number"
            )
        idx = top_k(self.scores[None], budget.count(len(self)))[0]
        place = (self.method, self.view, self.index, self.frame, self.image)
        return KeepMap(idx, len(self), self.grids, self.scores, *place)

    def draw(
        self, image: Picture | None = None, alpha: float = 0.65, *, max_side: int | None = 2000
    ) -> Image.Image:
        """Heat map over the picture; several blocks become panels side by side.

        Args:
            image: PIL image or path; without it, the map's own picture, or a grey canvas where it has none.
            alpha: strength of the colours.
            max_side: longest side of the drawing in pixels; None draws at the size of the picture.
        """
        from ..viz.overlay import draw_scores

        shown = self.image if image is None else image
        return draw_scores(shown, self.grids, self.scores, self.view, alpha, max_side)

    def _counts(self) -> str:
        return f"{len(self)} tokens, scores {float(self.scores.min()):.3g} to {float(self.scores.max()):.3g}"


@dataclass(frozen=True, eq=False, repr=False)
class KeepMap(_Map):
    """Which tokens of one image were kept.

    Args:
        keep_idx: (K,) ascending token indices, kept as int64 on the CPU; empty where a shared budget went
            elsewhere.
        total: N, the tokens there were; without it, what the grids hold.
        scores: (N,) where the method scores, else None.
        grids, method, view, index, frame, image: as in ``ScoreMap``.
        joins: (N,) where tokens were merged and the method says so: of each token the one in whose place the
            row stands that it became part of, -1 where it is dropped; -2, -3, ... are the first, second, ...
            row without a place of its own. (N, J), filled up with -1, where a token may be part of several
            rows. Of a frame these are numbers in the whole clip, where a row may stand in another frame.
        left: (M,) ascending, the tokens that a compression of the model itself left before the method chose
            among them; None where it has none, or left all.
    """

    keep_idx: Tensor
    total: int = 0
    grids: Grids = ()
    scores: Tensor | None = None
    method: str = ""
    view: str = "stretch"
    index: int = 0
    frame: int | None = None
    image: Picture | None = None
    joins: Tensor | None = None
    left: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self._settle(self.total or None))
        object.__setattr__(self, "keep_idx", owned_indices("keep_idx", self.keep_idx, self.total))
        if self.left is not None:
            object.__setattr__(self, "left", owned_indices("left", self.left, self.total))
            if not torch.isin(self.keep_idx, self.left).all():
                raise InvariantError(
                    f"keep_idx names {len(self.keep_idx)} tokens, of which left holds "
                    f"{int(torch.isin(self.keep_idx, self.left).sum())}; expected all of them among those "
                    "that the model itself left"
                )
        if self.scores is not None:
            object.__setattr__(self, "scores", owned_scores(self.scores))
        if self.joins is not None:
            object.__setattr__(self, "joins", owned("joins", self.joins, (1, 2)).to(torch.int64))
        for name in ("scores", "joins"):
            held = getattr(self, name)
            if held is not None and len(held) != self.total:
                raise InvariantError(
                    f"{name} hold {len(held)} tokens; expected one entry for each of {self.total}"
                )

    def __len__(self) -> int:
        return self.keep_idx.shape[0]

    @property
    def mask(self) -> Tensor:
        """(N,) bool, true where kept."""
        return torch.zeros(self.total, dtype=torch.bool).index_fill_(0, self.keep_idx, True)

    @property
    def merged(self) -> Tensor | None:
        """(N,) bool, true where a token is no kept one but part of a row; None where that is not said."""
        return None if self.joins is None else _any(self.joins != -1) & ~self.mask

    def members(self, token: int) -> Tensor:
        """(M,) ascending tokens of this map that became part of the row in the place of ``token``, itself
        included; of a frame, ``token`` is a number in the whole clip. -2, -3, ... ask for the rows that have
        no place of their own.
        """
        if self.joins is None:
            raise SpecError(f"{self} does not say what its rows are made of; members expects a map that does")
        if token == -1:
            raise SpecError("members(-1): -1 stands for no row; rows without a place are -2, -3, ...")
        return _any(self.joins == token).nonzero()[:, 0]

    @property
    def available(self) -> int:
        """Tokens that the method chose among: M where the model itself left fewer than N, else N."""
        return self.total if self.left is None else len(self.left)

    @property
    def kept_boxes(self) -> Tensor:
        """(K, 4) boxes of the kept tokens."""
        return self.boxes[self.keep_idx]

    @property
    def share(self) -> float:
        """K / N."""
        return len(self) / self.total

    def overlap(self, other: KeepMap) -> float:
        """Jaccard index of the two kept sets: 1 for the same tokens, 0 for none in common."""
        if other.total != self.total:
            raise SpecError(
                f"maps of {self.total} and {other.total} tokens; overlap expects maps of the same image and "
                "model"
            )
        union = int((self.mask | other.mask).sum())
        return int((self.mask & other.mask).sum()) / union if union else 1.0

    def coverage(self, cells: int | None = None) -> float:
        """Share of the view's area under a kept box of any block.

        With ``cells``, each block is cut into cells x cells coarse cells instead; the share is of those that
        hold a kept token's centre among those that hold any, so it is 1 if nothing was cut, however small the
        block.
        """
        parts = self.mask.split([rows * cols for rows, cols in self.grids])
        blocks = [part.reshape(grid).numpy() for part, grid in zip(parts, self.grids, strict=True)]
        if cells is None:
            return union_area(blocks)
        if cells < 1:
            raise SpecError(f"cells={cells}; expected at least 1, or None for the exact area")
        reached, kept = 0, 0
        for block in blocks:
            row, col = ((2 * np.arange(side) + 1) * cells // (2 * side) for side in block.shape)
            cell = row[:, None] * cells + col
            reached, kept = reached + len(np.unique(cell)), kept + len(np.unique(cell[block]))
        return kept / reached

    @property
    def replay(self) -> Replay:
        """A method that keeps exactly these tokens."""
        if not len(self):
            raise SpecError(f"{self} kept no token; replay expects a map that kept at least one")
        # a call in which the model drops tokens by itself counts in what it leaves
        chosen = self.keep_idx if self.left is None else torch.searchsorted(self.left, self.keep_idx)
        return Replay(tuple(chosen.tolist()), self.available)

    def draw(
        self, image: Picture | None = None, dim: float = 0.62, *, max_side: int | None = 2000
    ) -> Image.Image:
        """The picture, dropped patches grey and dark, merged ones paler, kept ones clear and outlined; other
        arguments as in ``ScoreMap``.

        Args:
            dim: 0 leaves the brightness of dropped patches, 1 makes them black.
        """
        from ..viz.overlay import draw_keep

        shown = self.image if image is None else image
        merged = False if self.merged is None else self.merged
        return draw_keep(shown, self.grids, self.mask, self.view, dim, max_side, merged)

    def _counts(self) -> str:
        own = "" if self.left is None else f" (the model itself left {self.available})"
        return f"{len(self)} of {self.total} tokens{own}"


def _brief(grids: Grids) -> str:
    """``12 x 12``; several blocks in full where they are few."""
    shown = [f"{rows} x {cols}" for rows, cols in grids[:4]]
    if len(grids) > 1 and len(set(grids)) == 1:
        return f"{len(grids)} times {shown[0]}"
    return " + ".join(shown) + (f" + {len(grids) - 4} more" if len(grids) > 4 else "")


def _stamp(cls: type[_Map]) -> dict[str, Any]:
    return {"format": f"vlmprune.{cls.__name__.lower()}", "version": 1}


def _suffix(path: PathName) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".safetensors", ".json"):
        raise SpecError(f"{str(path)!r} ends in {suffix!r}; expected .safetensors or .json")
    return suffix


def _any(marks: Tensor) -> Tensor:
    """(N,) bool of marks (N,), or of (N, J) whether any of a token is set."""
    return marks if marks.ndim == 1 else marks.any(dim=1)
