"""The two studies of the Stream paper (Rosser et al. 2025, arXiv:2510.19875), with its settings and with this package's.

    python benchmarks/paper.py needle [--model NAME_OR_FOLDER] [--lengths N ...] [--depths X ...] [--samples N] [--json FILE]
    python benchmarks/paper.py anchors [--model NAME_OR_FOLDER] [--new-tokens N] [--traces N | --trace FILE ...] [--json FILE]

`needle` hides numbers in essays, for google/gemma-3-1b-it; `anchors` scores the sentences of reasoning traces, for
deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B. Each finished step is printed, and kept in the folder --results: the same command
goes on where it was interrupted, and repeats no search. With --dry-run a small model of the same architecture with random
weights, built and saved here, stands in its place: the same code, smaller texts, no network, and figures that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from paper_studies import dry_run
from paper_studies.anchors import TraceSettings, anchors_study
from paper_studies.finished import Finished
from paper_studies.loading import InputError, load, tokens_of
from paper_studies.needle import DRY, FULL, fitted, needle_study
from paper_studies.traces import PROBLEMS, Trace, begin, generate, read
from rich.console import Console

from tl_stream import StreamConfig
from tl_stream.analysis import AnchorSettings
from tl_stream.analysis.needle_study import weights_digest
from tl_stream.audit import records
from tl_stream.budget import Sqrt
from tl_stream.tasks import reasoning_trace

MODELS = {"needle": "google/gemma-3-1b-it", "anchors": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"}
STAND_INS = {"needle": dry_run.save_gemma, "anchors": dry_run.save_qwen}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DRY_SENTENCES, DRY_TOKENS = 24, 32
ONLY_JSON = ("cells", "scores", "receiver heads", "budget", "text")
RESULTS = Path("paper-results")
RANDOM = (
    "DRY RUN: random weights, small texts. No figure below means anything; that there are figures shows that the code runs."
)
Tables = dict[str, list[dict[str, Any]]]


def main() -> int:
    options, parser = parsed()
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            if options.dry_run:
                STAND_INS[options.study](Path(folder))
            model = load(folder if options.dry_run else options.model, options.device, DTYPES[options.dtype])
        found = plain(STUDIES[options.study](model, options, remembered(model, options)))
    except InputError as error:
        parser.error(str(error))
    seconds = time.perf_counter() - start
    show(found, options, seconds)
    if options.json:
        about = {"study": options.study, "model": options.model, "dry_run": options.dry_run, "seconds": seconds}
        versions = {name: version(name) for name in ("torch", "transformers", "transformer-lens")}
        options.json.write_text(json.dumps({**about, "versions": versions, **found}, indent=1))
    return 0


def remembered(model: Any, options: argparse.Namespace) -> Finished:
    """What is done already of a study of this model; nothing is kept of a dry run, unless a folder is named."""
    folder = options.results or (None if options.dry_run else RESULTS)
    about = {"study": options.study, "model": weights_digest(model), "dtype": options.dtype, "version": version("tl-stream")}
    return Finished(folder, about, say)


def say(step: str, value: Any) -> None:
    """A line for each row that a step gave."""
    for row in value if isinstance(value, list) else [value]:
        if isinstance(row, dict):
            cells = [f"{name} {written(cell)}" for name, cell in row.items() if name not in ONLY_JSON]
            print(f"{step}: {', '.join(cells)}", flush=True)


def needle(model: Any, options: argparse.Namespace, finished: Finished) -> Tables:
    settings = DRY if options.dry_run else FULL
    lengths, depths = (tuple(sorted(set(each or ()))) for each in (options.lengths, options.depths))
    settings = replace(
        settings,
        lengths=lengths or settings.lengths,
        depths=depths or settings.depths,
        samples=settings.samples if options.samples is None else options.samples,
    )
    if not lengths and (fit := fitted(settings.lengths, model.cfg.n_ctx)) != settings.lengths:
        print(f"lengths: {fit}, for the model reads {model.cfg.n_ctx} tokens", flush=True)
        settings = replace(settings, lengths=fit)
    return needle_study(model, settings, finished)


def anchors(model: Any, options: argparse.Namespace, finished: Finished) -> Tables:
    settings = TraceSettings(traces=options.traces)
    if options.dry_run:
        begun = reasoning_trace(model.tokenizer, DRY_SENTENCES, seed=0).text
        settings = TraceSettings(
            2, DRY_TOKENS, begun, block=16, ours=StreamConfig(block_q=4, block_k=4, k=Sqrt(1.0)), sources=4
        )
        settings = replace(settings, scoring=AnchorSettings(n_heads=5))
    if options.trace:
        traces = [read(model, path) for path in options.trace]
    else:
        traces = [own_trace(model, seed, settings, options.new_tokens, finished) for seed in range(settings.traces)]
    return anchors_study(model, traces, settings, finished)


def own_trace(model: Any, seed: int, settings: TraceSettings, new_tokens: int | None, finished: Finished) -> Trace:
    """One that the model writes; of as many tokens as it reads, where no number was asked for."""
    problem = PROBLEMS[seed]
    room = model.cfg.n_ctx - tokens_of(model, begin(model, problem, settings.thoughts)).shape[1]
    n = min(settings.new_tokens, room) if new_tokens is None else new_tokens

    def compute() -> dict[str, Any]:
        trace = generate(model, problem, settings.thoughts, n, seed)
        return {"name": trace.name, "tokens": trace.tokens.shape[1], "sentences": len(trace.sentences), "text": trace.text}

    row = finished.once("trace", {"problem": problem, "thoughts": settings.thoughts, "new_tokens": n, "seed": seed}, compute)
    return Trace.of(model, row["name"], row["text"])


STUDIES = {"needle": needle, "anchors": anchors}


def show(found: Tables, options: argparse.Namespace, seconds: float) -> None:
    console = Console(width=160)
    if options.dry_run:
        console.print(f"[bold red]{RANDOM}[/bold red]")
    for name, rows in found.items():
        columns = [column for column in rows[0] if column not in ONLY_JSON] if rows else []
        cells = [[written(row[column]) for column in columns] for row in rows]
        title = f"{name} (random weights)" if options.dry_run else name
        console.print(records.table(title, columns, cells))
    kind = "in the place of " if options.dry_run else ""
    console.print(f"{options.study}, {kind}{options.model}, TransformerLens {version('transformer-lens')}: {seconds:.0f} s")


def written(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return ", ".join("-" if each is None else f"{each:.2f}" if isinstance(each, float) else str(each) for each in value)


def plain(value: Any) -> Any:
    """As JSON has it: numbers that are undefined (a correlation with what is constant) become null."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def parsed() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The command line; --help says what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = parser.add_subparsers(dest="study", required=True)
    for study, model in MODELS.items():
        part = studies.add_parser(study)
        part.add_argument("--model", default=model, metavar="NAME", help=f"a Hugging Face name or a folder ({model})")
        part.add_argument("--dry-run", action="store_true", help="a small random model in its place, small texts")
        part.add_argument(
            "--results", type=Path, metavar="FOLDER", help=f"finished steps, with which a study goes on ({RESULTS}; dry: none)"
        )
        part.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
        part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        part.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    needle, anchors = (studies.choices[study] for study in MODELS)
    needle.add_argument(
        "--lengths", type=int, nargs="+", metavar="TOKENS", help=f"of the prompts ({FULL.lengths}, up to n_ctx)"
    )
    needle.add_argument("--depths", type=float, nargs="+", metavar="SHARE", help=f"of the needle, 0 to 1 ({FULL.depths})")
    needle.add_argument("--samples", type=int, metavar="N", help=f"texts of each length and depth ({FULL.samples})")
    anchors.add_argument("--traces", type=int, choices=range(1, len(PROBLEMS) + 1), default=len(PROBLEMS), help="how many")
    anchors.add_argument("--new-tokens", type=int, metavar="N", help=f"of each, at most ({TraceSettings.new_tokens})")
    anchors.add_argument("--trace", type=Path, nargs="+", metavar="FILE", help="read these traces instead of generating some")
    options = parser.parse_args()
    return options, parser


if __name__ == "__main__":
    raise SystemExit(main())
