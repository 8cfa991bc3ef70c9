"""Can a few inserted tokens flip the sparse model's answer, and does the audit know? The adversarial study of Stream's critics.

The bundled model answers prompts of about 1,000 tokens: needles among others, and reasoning traces. Tokens to insert are
searched for at random and along the gradient (3 tokens, small budgets), for the paper's choice of blocks and for the default
one. What is found is run again at half and at larger budgets: a flip that goes away above is an artefact of sparsity. The
audit judges every sparse run of the study (with and without tokens, at all budgets) before the dense answer is seen, from the
run alone and rechecked (one more sparse run); its chances are those of benchmarks/verdict.py, fitted to another model.
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import Flips, find_flips
from tl_stream.analysis.flip_result import RUNS
from tl_stream.models.evaluate import wilson
from tl_stream.tasks import niah, reasoning_trace

TOKENS = 1024
SENTENCES = 80
FIRST_SEED = 20_000
SETTINGS = [(estimator, k, method) for estimator, k in (("stream", 32), ("auto", 2)) for method in ("random", "gcg")]


def prompts(tokenizer: Any, number: int) -> dict[int, list[str]]:
    """Prompts by the length of their answers."""
    seeds = range(FIRST_SEED, FIRST_SEED + number)
    needles = [niah(tokenizer, TOKENS, depth=seed % 7 / 6, keys=4, seed=seed).prompt for seed in seeds]
    return {7: needles, 1: [reasoning_trace(tokenizer, SENTENCES, seed=seed).prompt for seed in seeds]}


def flips(quick: bool) -> dict[str, Any]:
    """The study."""
    model: Any = tl_stream.models.load()
    by_length = prompts(model.tokenizer, 2 if quick else 6)
    jobs = [(setting, match) for setting in SETTINGS for match in by_length]
    found: dict[str, list[Flips]] = {}
    for (estimator, k, method), match in tqdm(jobs, desc="flips", file=sys.stderr):
        config = StreamConfig(block_q=8, block_k=8, k=k, estimator=estimator)
        result = find_flips(
            model, by_length[match], config, match=match, method=method, trials=32 if quick else 64, progress=False
        )
        found.setdefault(f"{estimator}, k = {k}, {method}", []).append(result)
    everything = [result for results in found.values() for result in results]
    tables = {name: table(results) for name, results in found.items()}
    summary: dict[str, Any] = {name: said(part) for name, part in tables.items()}
    summary["audit"] = audited(everything)
    rows = [
        {"setting": name, **row} for name, parts in found.items() for x in parts for row in x.to_dataframe().to_dict("records")
    ]
    return {"summary": summary, "tables": tables, "rows": rows}


def table(results: list[Flips]) -> dict[str, Any]:
    """The critics' table: how many prompts keep the dense answer in each run."""
    cases = [flip for result in results for flip in result.prompts]
    runs = {name: [flip.runs[name].same for flip in cases if name in flip.runs] for name in RUNS}
    return {
        "prompts": len(cases),
        "same answer": {name: f"{sum(same)}/{len(same)}" for name, same in runs.items()},
        "flipped without tokens": sum(not flip.sparse.same for flip in cases),
        "flipped by tokens": sum(flip.found for flip in cases),
        "of these artefacts of sparsity": sum(flip.is_artefact for flip in cases),
    }


def said(part: dict[str, Any]) -> str:
    return (
        f"{part['flipped without tokens']} of {part['prompts']} flip without tokens, {part['flipped by tokens']} more by "
        f"tokens ({part['of these artefacts of sparsity']} of them gone at a larger budget)"
    )


def audited(results: list[Flips]) -> dict[str, Any]:
    """How many sparse runs with another answer, and with the same one, the audit doubts; Wilson intervals at 95 %."""
    runs = [run for result in results for run in result.sparse_runs]
    parts = {}
    for audit, verdict in (("rechecked", "rechecked"), ("from the run alone", "trusted")):
        for name, same in (("another answer", False), ("the dense answer", True)):
            doubted = [not getattr(run, verdict) for run in runs if run.same == same]
            low, high = wilson(sum(doubted) / len(doubted), len(doubted))
            parts[f"doubted of runs with {name}, {audit}"] = f"{sum(doubted)}/{len(doubted)} [{low:.3f}, {high:.3f}]"
    return parts
