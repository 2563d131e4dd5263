# SPDX-License-Identifier: Apache-2.0
"""Push and pull: run folders, weights of trained methods and keep maps, as repositories of the HF Hub.

Nothing in the package calls this by itself. What is pushed is checked first, and nothing else in the folder
goes along; repositories that are made are private unless asked otherwise. What is pulled is checked as well.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from .checks import one_of
from .core.keepmap import KeepMap, ScoreMap
from .core.report import Report
from .core.weights import FORMAT as WEIGHTS
from .core.weights import checked_facts
from .errors import EvaluationError, SpecError, VlmPruneError

Kind = Literal["run", "weights", "maps"]
CARD = "README.md"
ROWS = "rows.parquet"


@dataclass(frozen=True)
class Sort:
    """How one kind of folder becomes a repository.

    Args:
        repo_type: on the Hub.
        files: those of a folder that go along, by exact name.
        check: raises, or gives the text of the card.
    """

    repo_type: str
    files: Callable[[Path], list[Path]]
    check: Callable[[Path], str]


def push(folder: str | PathLike[str], repo: str, *, public: bool = False, api: Any = None) -> str:
    """Upload a folder and return the address of the commit. The repository is made where it is missing.

    Args:
        folder: a run folder, the folder of a trained method, or one with saved keep maps and score maps.
        repo: such as "me/my-run".
        public: let everybody read a repository that is made; one that is there stays as it is.
        api: a ``huggingface_hub.HfApi`` with an endpoint or token of your own.
    """
    path = Path(folder)
    sort = SORTS[kind_of(path)]
    text = sort.check(path)
    files = [*sort.files(path), *path.glob(CARD)]
    _refuse_links_out(path, files)
    api = _api() if api is None else api
    try:
        with tempfile.TemporaryDirectory() as beside:
            extra = Path(beside)
            # a card that the user wrote stays
            if not (path / CARD).is_file():
                (extra / CARD).write_text(text, encoding="utf-8")
            # a table that the viewer of the Hub can show
            if sort is SORTS["run"]:
                write_rows(path, extra / ROWS)
            api.create_repo(repo_id=repo, repo_type=sort.repo_type, private=not public, exist_ok=True)
            # first what describes the files, so that a repository is never without its card
            if any(extra.iterdir()):
                _upload(api, repo, sort, extra, sorted(extra.iterdir()), "Add card and table")
            done = _upload(api, repo, sort, path, files, f"Add {kind_of(path)}")
    except OSError as error:  # of the network, and HfHubHTTPError
        raise _failed("push to", repo, error) from error
    return str(done.commit_url)


def pull(
    kind: Kind,
    repo: str,
    out: str | PathLike[str] | None = None,
    *,
    revision: str | None = None,
    api: Any = None,
) -> Path:
    """Download what ``push`` uploaded, check it, and return its folder.

    Args:
        kind: "run", "weights" or "maps".
        out: a folder to write to; the cache of huggingface_hub unless given.
        revision: branch, tag or commit.
        api: as in ``push``.
    """
    one_of("kind", kind, tuple(SORTS))
    sort = SORTS[kind]
    api = _api() if api is None else api
    try:
        found = api.snapshot_download(
            repo_id=repo,
            repo_type=sort.repo_type,
            revision=revision,
            local_dir=None if out is None else str(out),
        )
    except (OSError, ValueError) as error:
        raise _failed("pull from", repo, error) from error
    path = Path(found)
    # the repository may have been changed by others since
    sort.check(path)
    return path


def kind_of(folder: Path) -> Kind:
    """What a folder holds, by its files."""
    # the order matters: runs and weights hold *.json too, and so would pass for maps
    if (folder / "run.json").is_file():
        return "run"
    if any(_is_weights(path) for path in sorted(folder.glob("*.json"))):
        return "weights"
    if _map_files(folder):
        return "maps"
    state = "holds none of these" if folder.is_dir() else "is no folder"
    raise SpecError(
        f"{str(folder)!r} {state}: a run (run.json), weights of a trained method, saved maps "
        "(*.safetensors, *.json)"
    )


def load_maps(folder: str | PathLike[str]) -> dict[str, KeepMap | ScoreMap]:
    """The saved maps of a folder, by the names of their files."""
    files = _map_files(Path(folder))
    if not files:
        raise SpecError(
            f"{str(folder)!r} holds no maps; expected a folder with what KeepMap.save and ScoreMap.save "
            "write (*.safetensors, *.json)"
        )
    return {path.name: _load_map(path) for path in files}


def write_rows(run: str | PathLike[str], out: str | PathLike[str]) -> Path:
    """The rows of a leaderboard as a Parquet file: a line per spec, model and task, a column per number."""
    from .evaluation.leaderboard.rundir import Run
    from .evaluation.report.check import check
    from .evaluation.report.judge import ordered
    from .plain import flat

    try:
        from pyarrow import Table, parquet
    except ImportError as error:
        raise VlmPruneError(
            "Parquet files are written by pyarrow, which is not installed; install the extra in the clone: "
            'pip install -e ".[hub]"'
        ) from error
    lines = [flat(row) for row in ordered(check(Run.open(run)).rows)]
    # rows of other tasks have other columns, such as families
    names = list(dict.fromkeys(name for line in lines for name in line))
    columns = {name: [line.get(name) for line in lines] for name in names}
    parquet.write_table(Table.from_pydict(columns), out)
    return Path(out)


def deployment_card(
    model: str, spec: str, report: Report, accuracy: Mapping[str, float] | None = None
) -> str:
    """The section of a model card that says how a deployed model is pruned.

    Args:
        model: its name. spec: what is attached.
        report: of a typical prompt, as in ``run.last``.
        accuracy: measured shares by name, such as ``{"GQA, 1,000 questions": 0.612}``.
    """
    if not isinstance(report, Report):
        raise SpecError(
            f"report is a {type(report).__name__}; expected a Report, which is in run.last behind the first "
            "call of the model"
        )
    lines = [
        "## Visual token pruning",
        "",
        f"`{model}` runs with `vlmprune.prune(model, {spec!r})`; its weights are unchanged.",
        "",
        "| | |",
        "|---|---|",
        f"| spec | `{spec}` |",
        f"| visual tokens of one prompt | {sum(report.realised_tokens)} of {sum(report.dense_tokens)} |",
        f"| sequence | {report.sequence[1]} of {report.sequence[0]} |",
    ]
    lines += [f"| {name} | {100 * value:.1f} % |" for name, value in (accuracy or {}).items()]
    lines += [
        "",
        "Small objects, text and counting lose first when tokens are cut. Compare with the unpruned model "
        "before you rely on it: `vlmprune leaderboard`.",
    ]
    return "\n".join(lines) + "\n"


def _check_run(folder: Path) -> str:
    from .evaluation.leaderboard.journal import cells_of
    from .evaluation.leaderboard.rundir import Run
    from .evaluation.report.check import check
    from .evaluation.report.export import Options, as_markdown

    run = Run.open(folder)
    table = as_markdown(run, check(run), Options())
    # those of other configs as well, which are in no row of the table
    for cell in cells_of(folder):
        run.recipe(cell), run.journal(cell)
    # what the Hub reads of a card: tags, and the file that its viewer shows
    head = "---\ntags: [vlmprune]\nconfigs:\n- config_name: rows\n  data_files: rows.parquet\n---\n\n"
    return (
        f"{head}# A leaderboard of vlmprune\n\n`vlmprune.hub.pull('run', REPO)` gets the folder.\n\n{table}"
    )


def _check_weights(folder: Path) -> str:
    facts = [
        checked_facts(str(folder), path.stem) for path in _weight_files(folder) if path.suffix == ".json"
    ]
    if not facts:
        raise SpecError(
            f"{str(folder)!r} holds no weights; expected METHOD.safetensors and METHOD.json, as `vlmprune "
            "train` writes them"
        )
    said = "\n".join(
        f"- `{one['method']}`, trained with "
        + ", ".join(f"{name} {value}" for name, value in one["backbone"].items())
        + f": `vlmprune.prune(model, \"{one['method']}(weights='FOLDER')@64\")`"
        for one in facts
    )
    head = "---\ntags: [vlmprune]\nlibrary_name: vlmprune\n---\n\n"
    how = "FOLDER is what `vlmprune.hub.pull('weights', REPO)` gives."
    return f"{head}# Weights of trained pruning methods\n\n{how}\n\n{said}\n"


def _check_maps(folder: Path) -> str:
    lines = [f"| `{name}` | `{one!r}` |" for name, one in load_maps(folder).items()]
    head = "---\ntags: [vlmprune]\n---\n\n# Kept tokens and scores\n\n| file | |\n|---|---|\n"
    how = "\n\n`vlmprune.hub.load_maps(vlmprune.hub.pull('maps', REPO))` reads them.\n"
    return head + "\n".join(lines) + how


def _run_files(folder: Path) -> list[Path]:
    from .evaluation.leaderboard.journal import cells_of
    from .evaluation.leaderboard.rundir import Run

    # nothing else that was put among the cells
    cells = cells_of(folder)
    return [path for path in Run(folder).files() if path.parent == folder or path.stem in cells]


def _weight_files(folder: Path) -> list[Path]:
    # the JSON file names the method; its tensors lie beside it under the same name
    said = [path for path in sorted(folder.glob("*.json")) if _is_weights(path)]
    return [one for path in said for one in (path, path.with_suffix(".safetensors"))]


def _map_files(folder: Path) -> list[Path]:
    return sorted(path for ending in ("*.safetensors", "*.json") for path in folder.glob(ending))


SORTS: Mapping[Kind, Sort] = {
    "run": Sort("dataset", _run_files, _check_run),
    "weights": Sort("model", _weight_files, _check_weights),
    "maps": Sort("dataset", _map_files, _check_maps),
}


def _upload(api: Any, repo: str, sort: Sort, folder: Path, files: list[Path], message: str) -> Any:
    return api.upload_folder(
        repo_id=repo,
        repo_type=sort.repo_type,
        folder_path=str(folder),
        # by name: a folder may hold what is nobody else's business; these are read as patterns, in which
        # letters of a name such as "[" stand for something else
        allow_patterns=[escape(path.relative_to(folder).as_posix()) for path in files],
        commit_message=message,
    )


def _refuse_links_out(folder: Path, files: Sequence[Path]) -> None:
    """Raise where a file is a link to one elsewhere: what goes along is what lies in the folder."""
    here = folder.resolve()
    homes = [here]
    # the cache of huggingface_hub holds snapshots/COMMIT/NAME as links into blobs/
    if here.parent.name == "snapshots":
        homes.append(here.parent.parent / "blobs")
    for path in files:
        target = path.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise SpecError(
                f"{str(path)!r} is a link to {str(target)!r}, outside of the folder, and stays here; put a "
                "copy in its place, or remove it"
            )


def _is_weights(path: Path) -> bool:
    """Whether a JSON file says that it speaks of weights."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and said.get("format") == WEIGHTS


def _load_map(path: Path) -> KeepMap | ScoreMap:
    try:
        return KeepMap.load(path)
    except SpecError as error:
        try:
            return ScoreMap.load(path)
        except SpecError:
            # neither kind: the error of the first try
            raise error from None


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _failed(what: str, repo: str, error: Exception) -> VlmPruneError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return EvaluationError(
        f"cannot {what} {repo!r}: {reason}; check the name and the network, and log in with `hf auth login`"
    )
