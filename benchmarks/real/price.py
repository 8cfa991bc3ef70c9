"""What a trace of a real model costs beside the model's own forward pass: CPU seconds of one thread, and memory.

    PYTHONPATH=benchmarks python -m real.price ROWS FOLDER [FOLDER ...] [--tokens N ...] [--what NAME ...] [--code NAME]

Every case, of a model, a length and one of `WHAT`, is measured in a process of its own, on prose, in float32, with the last
position unembedded alone (but for `fidelity`, which compares all of them). First the case runs once: its peak is how far the
resident set rises above the loaded model (Linux only). Then it and Hugging Face's eager forward run in turn, and the medians
of their CPU seconds make the ratio. Before a model's first case it is checked, at `CHECKED` tokens, that with nothing pruned
the logits are the dense model's, and pruned, those of the dense model masked with the kept blocks; else nothing is measured.
Each case is a row appended to ROWS; an interrupted study goes on. To compare with an older tl_stream, put it first on
PYTHONPATH and name it by `--code`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_stream
from real.common import load, once, peak, prose, reset_peak, rows, versions
from tl_stream.audit import records
from tl_stream.cache import is_pattern

CHECKED, TOLERANCE = 256, 1e-4
TRACES: dict[str, tuple[dict[str, Any], bool]] = {  # by name: what the config changes, and whether all activations are cached
    "trace": ({}, False),
    "trace, all cached": ({}, True),
    "32 x 8, k = 16": ({"block_k": 8}, False),
    "8 x 8, k = 16": ({"block_q": 8, "block_k": 8}, False),
    "1 x 1, k = 32": ({"block_q": 1, "block_k": 1, "k": 32}, False),
}
WHAT = ("HF eager", "HF sdpa", *TRACES, "fidelity")
LENGTHS = (1100, 2048, 8192)
REPEATS = {1100: 2}  # longer texts once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="finished cases, JSON lines")
    parser.add_argument("folders", nargs="+", help="of models, as save_pretrained writes them")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="of the texts (%(default)s)")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, metavar="NAME", help=f"of {', '.join(WHAT)}")
    parser.add_argument("--code", default="this", help="name of the tl_stream that is measured (%(default)s)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.folders[0], options.tokens[0], options.what[0])))
        return 0
    wanted = [(folder, n, what) for folder in options.folders for n in options.tokens for what in options.what]
    for folder, n, what in tqdm(wanted, file=sys.stderr):
        about = {"model": Path(folder).name, "code": options.code, "tokens": n, "what": what}
        once(options.rows, about, partial(alone, options.rows, folder, n, what))
    Console(width=140).print(table(rows(options.rows)))
    return 0


def alone(path: Path, folder: str, n: int, what: str) -> dict[str, Any]:
    """One case, measured in a process of its own, of a model that was checked."""
    check(folder)
    command = [sys.executable, "-m", "real.price", str(path), folder, "--tokens", str(n), "--what", what, "--one"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


@torch.inference_mode()
def measured(folder: str, n: int, what: str) -> dict[str, Any]:
    """One case: its peak memory, its CPU seconds and those of the eager forward."""
    torch.set_num_threads(1)
    eager, (run, config) = hf(folder, "eager"), runs(folder, what)
    tokens = prose(AutoTokenizer.from_pretrained(folder), n)
    run(tokens[:, :64])
    before = reset_peak()
    held = run(tokens)
    most = None if before is None else peak() - before
    held_bytes, held = getattr(held, "nbytes", None), None
    seconds: dict[str, list[float]] = {"eager": [], what: []}
    for _ in range(REPEATS.get(n, 1)):
        seconds["eager"].append(cpu_seconds(eager, tokens))
        seconds[what].append(cpu_seconds(run, tokens))
    own, dense = (statistics.median(seconds[name]) for name in (what, "eager"))
    return {
        "config": config,
        "seconds": own,
        "seconds eager": dense,
        "ratio": own / dense,
        "all seconds": seconds,
        "peak bytes": most,
        "cache bytes": held_bytes,
        "threads": 1,
        "versions": versions(),
    }


def runs(folder: str, what: str) -> tuple[Callable[[torch.Tensor], Any], str | None]:
    """A case as a function of tokens, and its config."""
    if what.startswith("HF "):
        return hf(folder, what.removeprefix("HF ")), None
    model = load(folder)
    if what == "fidelity":
        return lambda tokens: tl_stream.fidelity(model, tokens, rows=256, new_tokens=0) and None, "StreamConfig()"
    changes, everything = TRACES[what]
    config = tl_stream.StreamConfig(**changes)
    names = None if everything else lambda name: False
    trace: Any = lambda tokens: model.run_with_sparse_cache(tokens, config=config, names_filter=names, logits_to_keep=1)[1]  # noqa: E731
    return trace, f"StreamConfig({', '.join(f'{name}={value}' for name, value in changes.items())})"


def hf(folder: str, attention: str) -> Callable[[torch.Tensor], Any]:
    """Hugging Face's own forward."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    return lambda tokens: model(tokens, logits_to_keep=1, use_cache=False) and None


def cpu_seconds(run: Callable[[torch.Tensor], Any], tokens: torch.Tensor) -> float:
    start = time.process_time()
    run(tokens)
    return time.process_time() - start


@cache
@torch.inference_mode()
def check(folder: str) -> None:
    """Exit where the sparse run is not what it should be."""
    model = load(folder)
    tokens = prose(model.tokenizer, CHECKED)
    dense = model(tokens)
    whole, _ = model.run_with_sparse_cache(tokens, config=tl_stream.StreamConfig(k=2**20), names_filter=lambda name: False)
    config = tl_stream.StreamConfig(block_q=16, block_k=8, k=4)
    logits, cache = model.run_with_sparse_cache(tokens, config=config, names_filter=is_pattern)
    keep = {f"blocks.{layer}.attn.hook_attn_scores": cache.block_layout(layer).to_dense() for layer in cache.patterns}

    def mask(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        return scores.masked_fill(~keep[hook.name], torch.finfo(scores.dtype).min)

    masked = model.run_with_hooks(tokens, fwd_hooks=[(name, mask) for name in keep])
    for name, found, expected in (("with nothing pruned", whole, dense), ("pruned", logits, masked)):
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error < TOLERANCE:
            raise SystemExit(f"{folder}: {name}, logits differ by {error:.1e} from what they should be; nothing is measured.")


def table(cases: list[dict[str, Any]]) -> Any:
    """Seconds, ratio and memory of every case."""
    header = ("model", "tl_stream", "tokens", "what", "CPU s", "eager: CPU s", "ratio", "peak over the model", "cache")
    lines = [
        (
            row["model"],
            row["code"],
            f"{row['tokens']:,}",
            row["what"],
            f"{row['seconds']:.2f}",
            f"{row['seconds eager']:.2f}",
            f"{row['ratio']:.2f}",
            "-" if row["peak bytes"] is None else f"{row['peak bytes'] / 1e6:,.0f} MB",
            None if row["cache bytes"] is None else f"{row['cache bytes'] / 1e6:,.0f} MB",
        )
        for row in cases
    ]
    return records.table("What a trace costs, on one thread", header, lines)


if __name__ == "__main__":
    raise SystemExit(main())
