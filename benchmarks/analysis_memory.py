"""How much memory each analysis takes on a long text.

python benchmarks/analysis_memory.py [--tokens N] [--json FILE] [NAME ...]

The bundled model reads a needle task of so many tokens (more than it was trained on; memory does not care), blocks of 32,
k = 16. Each analysis runs in a process of its own, whose peak memory (torch and the model included) and CPU seconds are shown;
the sparse run that it starts from, if it needs one, is part of both. Gradients are off where the analysis takes none. An
analysis whose result fails its check shows no figures.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rich
import torch
from rich.table import Table
from torch import Tensor

import tl_stream
from tl_stream import StreamConfig, analysis
from tl_stream.cache import SparseActivationCache, is_pattern

CONFIG = StreamConfig(block_q=32, block_k=32, k=16)
NEW_TOKENS = 16  # left of the length for what is inserted, generated or answered
DIVIDER = "result: "


class Text:
    """The text, and the sparse run over it that many analyses begin with."""

    def __init__(self, n_tokens: int) -> None:
        self.model: Any = tl_stream.models.load()
        tokenizer: Any = self.model.tokenizer
        self.task = tl_stream.tasks.niah_single_1(tokenizer, n_tokens - NEW_TOKENS, depth=0.4, seed=0)
        self.tokens: Tensor = self.model.to_tokens(self.task.prompt)
        self.n_tokens = self.tokens.shape[1]

    def run(self, names: Callable[[str], bool], **kwargs: Any) -> SparseActivationCache:
        """A sparse run that caches what is named."""
        _, cache = self.model.run_with_sparse_cache(self.tokens, config=CONFIG, names_filter=names, logits_to_keep=1, **kwargs)
        return cache

    @cached_property
    def sentences(self) -> tuple[Any, ...]:
        """The text's sentences."""
        return analysis.sentences(self.task.prompt, self.model)


def finite(values: Iterable[float | None]) -> bool:
    """Whether there are numbers, all of them finite."""
    numbers = [value for value in values if value is not None]
    return bool(numbers) and all(map(math.isfinite, numbers))


def needle_grid(text: Text) -> bool:
    (cell,) = analysis.needle_grid(text.model, [text.n_tokens], [0.4], [CONFIG.k], config=CONFIG, progress=False).cells
    return finite([cell.accuracy_sparse, cell.needle_retained]) and 0 < cell.pruned < 1


def needle_routes(text: Text) -> bool:
    cache = text.run(analysis.flow_names)
    found = analysis.needle_routes(cache, text.task.needle, top=3)
    edges = analysis.random_edges(cache, 16)
    with tl_stream.sparse(text.model, CONFIG, logits_to_keep=1):
        cut = text.model.run_with_hooks(text.tokens, fwd_hooks=analysis.cut_edges([*found.edges, *edges]))
    return finite(route.score for route in found.routes) and bool(cut.isfinite().all())


def information_flow(text: Text) -> bool:
    graph = analysis.information_flow(text.run(analysis.flow_names))
    return finite(edge.weight for edge in graph.edges)


def over_squashing(text: Text) -> bool:
    sums = analysis.over_squashing(text.run(analysis.flow_names))
    whole = torch.tensor(2.0**sums.n_layers, dtype=sums.bounds.dtype)
    return sums.bounds.shape == (1, text.n_tokens) and torch.allclose(sums.bounds.sum(), whole, rtol=1e-3)


def head_scores(text: Text) -> bool:
    scores = analysis.head_scores(text.run(is_pattern), text.tokens)
    return len(scores.heads) == _heads(text) and finite(head.entropy for head in scores.heads)


def receiver_heads(text: Text) -> bool:
    scores = analysis.vertical_scores(text.run(is_pattern), text.sentences)
    return finite(analysis.receiver_heads(scores).kurtosis.flatten().tolist())


def sentence_matrix(text: Text) -> bool:
    matrix = analysis.sentence_matrix(text.run(is_pattern), 1, text.sentences)
    return matrix.shape[1:] == (len(text.sentences),) * 2 and bool(matrix.isfinite().all())


def suppression(text: Text) -> bool:
    sources = (0, len(text.sentences) // 2)
    effects = analysis.suppression(text.model, text.tokens, text.sentences, config=CONFIG, sources=sources, progress=False)
    return finite(effects.effects[-1, list(sources)].tolist())


def suppression_dense(text: Text) -> bool:
    effects = analysis.suppression(text.model, text.tokens, text.sentences, sources=(0,), batch_size=1, progress=False)
    return finite(effects.effects[-1, :1].tolist())


def resampling(text: Text) -> bool:
    def sampler(prefix: str, n: int) -> list[str]:
        prompt = text.model.to_tokens(prefix).expand(n, -1)
        with tl_stream.sparse(text.model, CONFIG):
            new = text.model.generate(prompt, max_new_tokens=4, do_sample=True, stop_at_eos=False, verbose=False)
        return [text.model.to_string(row[prompt.shape[1] :]) for row in new]

    found = analysis.resampling_importance(
        text.task.prompt, text.sentences[-1:], sampler, lambda whole: whole.split()[-1], samples=2, progress=False
    )
    return finite(each.resampling for each in found.sentences)


def flips(text: Text, method: str) -> bool:
    found = analysis.find_flips(
        text.model, [text.tokens], CONFIG, trials=4, batch_size=2, method=method, position=1, progress=False
    )
    return len(found.prompts) == 1 and finite(x for run in found.sparse_runs for x in (run.chance_rechecked, run.retained))


def patch_by_block(text: Text) -> bool:
    corrupted = text.tokens.clone()
    corrupted[0, text.task.value.slice] = text.tokens[0, text.task.value.slice].flip(0)
    first, second = text.tokens[0, text.task.value.slice][[0, -1]]
    found = analysis.patch_by_block(
        text.model,
        text.tokens,
        corrupted,
        lambda logits: logits[0, -1, first] - logits[0, -1, second],
        config=CONFIG,
        block=1024,
        keep=1,
        progress=False,
    )
    return finite(each.effect for each in found.effects)


def fidelity(text: Text) -> bool:
    found = tl_stream.fidelity(text.model, text.tokens, CONFIG, rows=1024, new_tokens=4)
    return len(found.heads) == _heads(text) and finite(head.retained_mean for head in found.heads)


def audit(text: Text) -> bool:
    found = text.run(is_pattern).audit()
    return len(found.heads) == _heads(text) and len(found.answers) == 1


def find_budget(text: Text, over: str) -> bool:
    found = tl_stream.find_budget(text.model, text.tokens, 2, config=CONFIG, over=over, progress=False)
    return found.best is not None and found.best.tokens == found.dense_tokens


def exact_forward(text: Text) -> bool:
    _, cache = text.model.run_with_sparse_cache(
        text.tokens, config=StreamConfig(k=16, forward="exact"), names_filter=is_pattern, logits_to_keep=1
    )
    return len(cache.patterns) == text.model.cfg.n_layers


ANALYSES: dict[str, Callable[[Text], bool]] = {
    "sparse_run": lambda text: 0 < text.run(is_pattern).pruned < 1,
    "exact_forward": exact_forward,
    "needle_grid": needle_grid,
    "needle_routes": needle_routes,
    "information_flow": information_flow,
    "over_squashing": over_squashing,
    "head_scores": head_scores,
    "receiver_heads": receiver_heads,
    "sentence_matrix": sentence_matrix,
    "suppression": suppression,
    "suppression_dense": suppression_dense,
    "resampling": resampling,
    "find_flips_random": lambda text: flips(text, "random"),
    "find_flips_gcg": lambda text: flips(text, "gcg"),
    "patch_by_block": patch_by_block,
    "fidelity": fidelity,
    "audit": audit,
    "find_budget_k": lambda text: find_budget(text, "k"),
    "find_budget_total": lambda text: find_budget(text, "total"),
}


def _heads(text: Text) -> int:
    return text.model.cfg.n_layers * text.model.cfg.n_heads


@torch.no_grad()
def run_here(name: str, n_tokens: int) -> None:
    """One analysis in this process; its figures as the last line."""
    text = Text(n_tokens)
    before = peak_bytes()
    start = time.process_time()
    if not ANALYSES[name](text):
        raise SystemExit(f"{name}: the result is not what was expected; no figures.")
    seconds = time.process_time() - start
    figures = {"name": name, "peak_bytes": peak_bytes(), "before_bytes": before, "seconds": seconds}
    print(DIVIDER + json.dumps(figures))


def run_apart(name: str, n_tokens: int) -> dict[str, Any]:
    """The same in a new process."""
    command = [sys.executable, __file__, "--here", "--tokens", str(n_tokens), name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.rpartition(DIVIDER)[2])


def peak_bytes() -> int:
    """The most memory that this process has taken so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ANALYSES))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", action="store_true", help="run one analysis in this process")
    options = parser.parse_args()
    unknown = set(options.names) - ANALYSES.keys()
    if unknown:
        parser.error(f"no analysis is named {', '.join(sorted(unknown))}; there are {', '.join(ANALYSES)}")
    if options.here:
        run_here(options.names[0], options.tokens)
        return
    results = []
    for name in options.names or ANALYSES:
        results.append(run_apart(name, options.tokens))
        print(f"{name}: {results[-1]['peak_bytes'] / 1e9:.2f} GB, {results[-1]['seconds']:.0f} s", flush=True)
    table = Table("analysis", "peak, GB", "before it, GB", "CPU seconds", title=f"{options.tokens:,} tokens")
    for each in results:
        gigabytes = (f"{each[key] / 1e9:.2f}" for key in ("peak_bytes", "before_bytes"))
        table.add_row(each["name"], *gigabytes, f"{each['seconds']:.0f}")
    rich.print(table)
    machine = {"torch": torch.__version__, "transformer_lens": version("transformer-lens"), "machine": platform.machine()}
    if options.json:
        options.json.write_text(json.dumps({"tokens": options.tokens, **machine, "analyses": results}, indent=2))


if __name__ == "__main__":
    main()
