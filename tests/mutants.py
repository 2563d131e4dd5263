# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501
"""Break the core on purpose and see that the conformance checks notice.

    python tests/mutants.py            # all mutants, about five minutes
    python tests/mutants.py NAME ...   # some

Each mutant is one replaced line in a copy of the package; it is *killed* when a check that passes on the real package does not. Where a
mistake cannot show inside a model, the test file that holds it is named. Exit code 1 when a mutant survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    spec: str = "fastervlm@9"
    family: str = "llava"
    tests: str = ""  # a test file, or a test of it, to run instead of the checks


MUTANTS = [
    Mutant("inverted sort", "core/select.py", "dispatch.topk_select(scores, k)", "dispatch.topk_select(-scores, k)"),
    Mutant("unsorted output", "core/select.py", "topk_select(scores, k).long()", "topk_select(scores, k).long().flip(1)", tests="tests/core/test_select.py"),
    Mutant("off by one in the slots", "core/cutting.py", "keep[patches[kept[-1]]] = True", "keep[(patches[kept[-1]] + 1) % picture.length] = True"),
    Mutant("newlines dropped", "core/cutting.py", "keep = torch.ones(picture.length, dtype=torch.bool)\n    keep[patches]", "keep = torch.zeros(picture.length, dtype=torch.bool)\n    keep[patches]", family="llava_next"),
    Mutant("positions not compacted", "core/compaction.py", 'if policy == "compact":', "if False:"),
    Mutant("positions always compacted", "core/compaction.py", 'if policy == "compact":', "if True:"),
    Mutant("decode positions forget the cut", "core/entrance.py", "frames.append(Frame(group.start, past, mask[:, seen:], position_ids - lost[:, None], lost, maskless, types))", "frames.append(Frame(group.start, past, mask[:, seen:], position_ids, lost, maskless, types))"),
    Mutant("mask left in the seen frame", "core/entrance.py", "past = torch.cat([group.held.to(mask.device), mask[:, state.seen : seen]], dim=1)", "past = mask[:, : held_length(call.cache)]"),
    Mutant("dead slots not masked", "core/frames.py", "return Frame(start, self.past, compaction.valid,", "return Frame(start, self.past, torch.ones_like(compaction.valid),"),
    Mutant("cache tells held as seen", "core/cache.py", "return held + state.seen - state.groups[0].held.shape[1]", "return held"),
    Mutant("reorder forgets the masks", "core/cache.py", "        super().reorder_cache(beam_idx)\n        self._rows(beam_idx)", "        super().reorder_cache(beam_idx)\n        self._rows(beam_idx * 0)", spec="fastervlm@9"),
    Mutant("output not expanded", "core/entrance.py", "output.last_hidden_state = call.expand(output.last_hidden_state)", "pass"),
    Mutant("wrong row expanded", "core/compaction.py", "self.kept.cumsum(dim=1) - 1", "self.kept.cumsum(dim=1) - 2"),
    Mutant("state outlives the call", "core/session.py", "call, self._local.call = self.call, None", "call = self.call"),
    Mutant("hook left behind", "core/session.py", "        for handle in self._handles:\n            handle.remove()", "        for handle in self._handles[1:]:\n            handle.remove()"),
    Mutant("wrapper left behind", "core/session.py", "            del module.__dict__[name]", "            pass"),
    Mutant("capture left behind", "core/session.py", "        self.capture.remove()\n", ""),
    Mutant("detached cache goes on", "core/cache.py", "if owner is None or not owner.attached:", "if False:"),
    Mutant("scores of another image", "core/pictures.py", "    if index.shape[0] == picture.count:\n        return value\n", "    if index.shape[0] == picture.count:\n        return value.flip(0)\n", tests="tests/test_api.py"),
    Mutant("pictures of another row", "core/call.py", "rows.extend([mine] * expand)", "rows.extend([mine[::-1]] * expand)", spec="random@9", family="llava"),
    Mutant("one thread's record for all", "core/session.py", "self._local = threading.local()", "self._local = type('Shared', (), {})()"),
    Mutant("2-D mask lost on static caches", "core/wrappers.py", 'return kwargs["attention_mask"] if "attention_mask" in kwargs else args[0]', "return self.original(*args, **kwargs)"),
    Mutant("merged rows not placed", "core/entrance.py", "embeds = placed.replace(embeds)", "placed.replace(embeds)", spec="pool@9"),
    Mutant("wrong query row", "core/capture.py", "row_attention(queries[:, 0]", "row_attention(queries[:, 1]", tests="tests/golden"),
    Mutant("[CLS] column not removed", "core/capture.py", ".append(row[..., first:])", ".append(row[..., : row.shape[-1] - first])", tests="tests/golden"),
    Mutant("off-by-one layer", "core/capture.py", "index = layer + count if layer < 0", "index = layer + count - 1 if layer < 0", tests="tests/golden"),
    Mutant("attention map held", "core/capture.py", "self.capture.prefix, self.capture.needs\n", "self.capture.prefix, self.capture.needs\n        queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1)\n"),
    Mutant("off-by-one layer inside", "methods/fastv.py", "source=self.layer - 1", "source=self.layer", tests="tests/methods/test_fastv.py"),
    Mutant("wrong query row inside", "core/inside.py", "raters[row, end[-1]] = True", "raters[row, end[0]] = True", spec="fastv(layer=2)@9"),
    Mutant("wrong position policy inside", "methods/fastv.py", 'positions: ClassVar[str] = "original"', 'positions: ClassVar[str] = "compact"', tests="tests/golden"),
    Mutant("later layers keep the old mask", "core/inside.py", 'kwargs["attention_mask"] = frame.mask(', 'frame.mask(', spec="fastv(layer=2)@9"),
    Mutant("later layers keep the old angles", "core/inside.py", 'kwargs["position_embeddings"] = tuple(', 'tuple(', spec="pyramiddrop@0.5"),
    Mutant("sinks of every row", "core/reweight.py", "marked[rows]", "marked[rows * 0]", tests="tests/core/test_reweight.py"),
    Mutant("sinks forgotten when decoding", "core/entrance.py", "call.marks_before = state.marks", "pass", tests="tests/core/test_reweight.py"),
    Mutant("types of other tokens", "core/frames.py", "self.fed.gather(1, compaction.index.to(self.fed.device))", "self.fed[:, : compaction.width]", spec="fastervlm(cls=mean)@9", family="gemma3"),
    Mutant("causal after a cut", "core/entrance.py", "self._types(call, fed) if typed and call.placed else None", "None", spec="fastervlm(cls=mean)@9", family="paligemma"),
    Mutant("recomputed rows look back only", "core/rows.py", "if self.mask is not None:", "if False:", spec="sparsevlm@0.25", family="paligemma"),
    Mutant("angles of another kind of layer", "core/frames.py", "language_model.config.layer_types[layer] if _turns", "language_model.config.layer_types[-1] if _turns", spec="fastv(layer=1)@9", family="gemma3"),
    Mutant("gradient cut off", "core/entrance.py", "return compaction.sequence(embeds)", "return compaction.sequence(embeds.detach())"),
    Mutant("the right one of equals", "kernels/cpu.py", "np.flatnonzero(row == limit)[: k - np.count_nonzero(keep)]", "np.flatnonzero(row == limit)[np.count_nonzero(keep) - k :]", tests="tests/kernels/test_select.py"),
    Mutant("ties ignored", "kernels/cpu.py", "keep[np.flatnonzero(row == limit)[: k - np.count_nonzero(keep)]] = True", "keep[np.flatnonzero(row == limit)] = True", tests="tests/kernels/test_select.py"),
    Mutant("NaN above all", "kernels/cpu.py", "if limit == limit else reference", "if True else reference", tests="tests/kernels/test_select.py"),
    Mutant("budget not clamped on the CPU", "kernels/cpu.py", "if k >= n:", "if k == n:", tests="tests/kernels/test_ops.py::test_a_budget_above_the_number_of_tokens_takes_them_all"),
    Mutant("two zeros", "kernels/reference.py", "torch.sort(0.0 - scores.float()", "torch.sort(scores.float().view(torch.int32) ^ ((scores.float().view(torch.int32) >> 31) & 0x7FFFFFFF) ^ -1", tests="tests/kernels/test_select.py"),
    Mutant("reference takes the right one of equals", "kernels/reference.py", "torch.sort(0.0 - scores.float(), dim=-1, stable=True).indices", "(scores.shape[-1] - 1 - torch.sort(0.0 - scores.float().flip(-1), dim=-1, stable=True).indices)", tests="tests/kernels/test_select.py"),
    Mutant("NaN above all in the reference", "kernels/reference.py", "torch.sort(0.0 - scores.float()", "torch.sort(-torch.where(scores.isnan(), torch.inf, scores).float()", tests="tests/kernels/test_select.py"),
    Mutant("rows behind from the full budget", "kernels/reference.py", "last + (pre + n)", "last + (pre + n - 1)", tests="tests/kernels/test_select.py"),
    Mutant("budget not clamped for rows behind", "kernels/ops.py", "pre + idx.shape[1] + post", "pre + k + post", tests="tests/kernels/test_ops.py::test_a_budget_above_the_number_of_tokens_takes_them_all"),
    Mutant("rows of the first sample", "kernels/eager.py", "torch.arange(idx.shape[0], device=idx.device)[:, None] * n", "0 * n", tests="tests/kernels/test_select.py"),
    Mutant("repeated rows overwrite", "kernels/eager.py", "place = full.index_copy_ if ordered else full.index_add_", "place = full.index_copy_", tests="tests/kernels/test_select.py"),
    Mutant("indices not looked at", "kernels/checks.py", "if low < 0 or high >= n:", "if False:", tests="tests/kernels/test_bad_input.py"),
    Mutant("a token picked twice", "kernels/cpu_greedy.py", "        apart[token] = -np.inf  # and a minimum keeps it there\n", "", tests="tests/kernels/test_greedy.py"),
    Mutant("nearest to itself", "kernels/cpu_greedy.py", "        part[number, start + number] = -np.inf\n", "", tests="tests/kernels/test_greedy.py"),
    Mutant("blocks of pairs compared one way", "kernels/cpu_greedy.py", "            np.maximum(found[theirs], sim.max(axis=0), out=found[theirs])\n", "", tests="tests/kernels/test_greedy.py"),
    Mutant("NaN picked first", "kernels/cpu_greedy.py", "numbers = free[~np.isnan(value[free])]", "numbers = free", tests="tests/kernels/test_greedy.py"),
    Mutant("noise of a residual picked", "kernels/reference.py", "RESIDUAL = 1e-5", "RESIDUAL = 0.0", tests="tests/kernels/test_greedy.py"),
    Mutant("gradient of another row", "kernels/ops.py", "rows = reference.with_ends(idx, *ctx.ends)", "rows = reference.with_ends(idx.flip(0), *ctx.ends)", tests="tests/kernels/test_ops.py::test_gradients_that_are_not_contiguous"),
    Mutant("log-sum-exp of the cut row", "kernels/eager.py", "logits.softmax(-1) if lse is None", "logits[..., v0:].softmax(-1) if lse is None", tests="tests/kernels/test_scores.py"),
]  # fmt: skip


def killed_by(mutant: Mutant) -> list[str]:
    """Names of the checks that fail on a copy of the package with this mutant."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "vlmprune", Path(folder) / "vlmprune", ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(folder) / "vlmprune" / mutant.file
        source = path.read_text()
        if source.count(mutant.old) != 1:
            raise SystemExit(f"mutant {mutant.name!r}: its line stands {source.count(mutant.old)} times in {mutant.file}; expected once: update the list")
        path.write_text(source.replace(mutant.old, mutant.new))
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONSAFEPATH": "1"}
        if mutant.tests:
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / mutant.tests)]
            run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, timeout=300)
            return [mutant.tests] if run.returncode == 1 else []
        code = (
            "from vlmprune.testing.conformance import run_checks\n"
            f"for r in run_checks({mutant.spec!r}, [{mutant.family!r}]):\n"
            "    if r.status != 'pass': print('FAILED', r.check)\n"
            "print('DONE')"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=folder, timeout=300)
        failed = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("FAILED")]
        return failed if "DONE" in run.stdout else [*failed, "(crash)"]


def main(names: list[str]) -> int:
    survivors = []
    for mutant in [m for m in MUTANTS if not names or m.name in names]:
        failed = killed_by(mutant)
        survivors += [] if failed else [mutant.name]
        print(f"{'killed  ' if failed else 'SURVIVED'}  {mutant.name:34s} {', '.join(failed[:4])}", flush=True)
    print(f"{len(survivors)} of {len(MUTANTS) if not names else len(names)} mutants survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
