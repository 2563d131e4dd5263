# SPDX-License-Identifier: Apache-2.0
"""``--draw`` of ``vlmprune run``: where a drawing may go, and what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import check_apart
from ..errors import SpecError, UnsupportedError, VlmPruneError

if TYPE_CHECKING:
    from ..core.report import Report
    from ..spec import Spec


def check_draw(path: Path, shown: str | None, spec: Spec) -> None:
    """Raise unless a drawing can be written.

    Args:
        shown: the file of the picture or clip; None where there is none.
    """
    from PIL import Image

    # endings of formats that Pillow can write, and not only read
    known = sorted(ending for ending, form in Image.registered_extensions().items() if form in Image.SAVE)
    if path.suffix.lower() not in known:
        raise SpecError(
            f"--draw {str(path)!r} ends in {path.suffix!r}; expected a picture file such as kept.png"
        )
    if not path.absolute().parent.is_dir():
        raise SpecError(
            f"--draw {str(path)!r}: the folder {str(path.parent)!r} does not exist; make it first"
        )
    if shown is not None:
        check_apart("--draw", path, [Path(shown)])
    from ..models.shrink import shrinks

    if not spec.prunes or shrinks(spec):
        why = "shrinks the picture and chooses no tokens" if spec.prunes else "keeps every token"
        raise SpecError(
            f"--draw has nothing to show: {str(spec)!r} {why}; give a budget, as in fastervlm@0.25"
        )


def draw_kept(report: Report, picture: Any, path: Path, spec: Spec) -> None:
    """Write the picture, or a strip of the frames of a clip, with its kept patches."""
    if not report.keep:
        raise UnsupportedError(
            f"--draw: {report.method!r} recorded no kept tokens; expected a method before the language model"
        )
    from ..videofile import Clip, clock
    from ..viz.strip import draw_strip

    if isinstance(picture, Clip):
        labels = [clock(time) for time in picture.times]
        drawn = draw_strip(picture.frames, report.keep, labels, spec.merges)
    elif len(report.keep) > 1:
        raise UnsupportedError(
            f"--draw: the tiles of this picture are {len(report.keep)} pictures to the model, and no one map "
            "lies on the whole; give a smaller picture, which is cut into fewer, or leave --draw out"
        )
    else:
        drawn = report.keep[0].draw(picture)
    try:
        drawn.save(path)
    except OSError as error:
        raise VlmPruneError(
            f"--draw {str(path)!r} cannot be written ({error}); choose another place"
        ) from error
