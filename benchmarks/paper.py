"""The two studies of the Stream paper (Rosser et al. 2025, arXiv:2510.19875), with its settings and with this package's.

    python benchmarks/paper.py needle [--model NAME_OR_FOLDER] [--dry-run] [--cells FILE] [--json FILE]
    python benchmarks/paper.py anchors [--model NAME_OR_FOLDER] [--dry-run] [--trace FILE ...] [--json FILE]

`needle` hides numbers in essays, for google/gemma-3-1b-it; `anchors` scores the sentences of reasoning traces, for
deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B. With --dry-run a small model of the same architecture with random weights, built and
saved here, stands in its place: the same code, smaller texts, no network, and figures that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from paper_studies import dry_run
from paper_studies.anchors import TraceSettings, anchors_study
from paper_studies.loading import InputError, load
from paper_studies.needle import DRY, FULL, needle_study
from paper_studies.traces import PROBLEMS, generate, read
from rich.console import Console
from tqdm import trange

from tl_stream import StreamConfig
from tl_stream.analysis import AnchorSettings
from tl_stream.audit import records
from tl_stream.budget import Sqrt
from tl_stream.tasks import reasoning_trace

MODELS = {"needle": "google/gemma-3-1b-it", "anchors": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"}
STAND_INS = {"needle": dry_run.save_gemma, "anchors": dry_run.save_qwen}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DRY_SENTENCES, DRY_TOKENS = 24, 32
ONLY_JSON = ("cells", "scores", "receiver heads")
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
        found = plain(needle(model, options) if options.study == "needle" else anchors(model, options))
    except InputError as error:
        parser.error(str(error))
    seconds = time.perf_counter() - start
    show(found, options, seconds)
    if options.json:
        about = {"study": options.study, "model": options.model, "dry_run": options.dry_run, "seconds": seconds}
        versions = {name: version(name) for name in ("torch", "transformers", "transformer-lens")}
        options.json.write_text(json.dumps({**about, "versions": versions, **found}, indent=1))
    return 0


def needle(model: Any, options: argparse.Namespace) -> Tables:
    settings = DRY if options.dry_run else FULL
    if options.lengths:
        settings = replace(settings, lengths=tuple(sorted(options.lengths)))
    return needle_study(model, settings, options.cells)


def anchors(model: Any, options: argparse.Namespace) -> Tables:
    settings = TraceSettings()
    if options.dry_run:
        begun = reasoning_trace(model.tokenizer, DRY_SENTENCES, seed=0).text
        settings = TraceSettings(
            2, DRY_TOKENS, begun, block=16, ours=StreamConfig(block_q=4, block_k=4, k=Sqrt(1.0)), sources=4
        )
        settings = replace(settings, scoring=AnchorSettings(n_heads=5))
    if options.trace:
        traces = [read(model, path) for path in options.trace]
    else:
        seeds = trange(settings.traces, desc="generated traces", file=sys.stderr)
        traces = [generate(model, PROBLEMS[seed], settings.thoughts, settings.new_tokens, seed) for seed in seeds]
    return anchors_study(model, traces, settings)


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
    return ", ".join("-" if each is None else f"{each:.2f}" for each in value) if isinstance(value, list) else value


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
        part.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
        part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        part.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    needle, anchors = (studies.choices[study] for study in MODELS)
    needle.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help=f"of the prompts ({FULL.lengths})")
    needle.add_argument("--cells", type=Path, metavar="FILE", help="finished cells: an interrupted study goes on")
    anchors.add_argument("--trace", type=Path, nargs="+", metavar="FILE", help="read these traces instead of generating some")
    options = parser.parse_args()
    return options, parser


if __name__ == "__main__":
    raise SystemExit(main())
