"""How time and memory grow with the number of tokens: dense run_with_cache, sparse cache, and the attention-free floor.

    python benchmarks/scaling.py [--quick] [--json FILE]

One model with random weights (2 layers, d_model 256, 4 heads of 64, 2 kv heads, gated MLP of 1,024, rotary), one text, no
gradients; blocks of 64, k = 16. Each row is measured in a process of its own: seconds are the median of the repeats after a
warm-up, peak_bytes the growth of the resident set at its highest over the loaded model, cache_bytes what the cache of the
patterns holds (Linux only: it is read from /proc). First the sparse run is checked against the dense model; nothing is reported
where that fails.

- dense: `model.run_with_cache`, patterns cached
- sparse: `model.run_with_sparse_cache`, patterns cached
- floor: the same forward with scores, softmax and pattern @ v replaced by passing v through
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import einops
import torch
import torch.nn.functional as F
import transformer_lens
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tl_stream
from tl_stream import StreamConfig
from tl_stream.cache import is_pattern

CONFIG = StreamConfig(block_q=64, block_k=64, k=16, estimator="dual", beam=2, leaf_queries=4)
METHODS = ("floor", "sparse", "dense")
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
FIT_FROM = 4096
DENSE_COPIES = 8  # T x T tensors that the dense model holds at its peak: measured, rounded up
Run = Callable[[Any, torch.Tensor], int]


def build_model(n_ctx: int, dtype: torch.dtype = torch.float32) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=256, n_heads=4, d_head=64, n_key_value_heads=2, d_mlp=1024, gated_mlp=True, act_fn="silu",
        normalization_type="RMS", positional_embedding_type="rotary", rotary_dim=64, n_ctx=n_ctx, d_vocab=1000, seed=0,
        dtype=dtype,
    )  # fmt: skip
    return HookedTransformer(config).eval()


def run_dense(model: Any, tokens: torch.Tensor) -> int:
    _, cache = model.run_with_cache(tokens, names_filter=is_pattern)
    return sum(x.nbytes for x in cache.values())


def run_sparse(model: Any, tokens: torch.Tensor) -> int:
    _, cache = model.run_with_sparse_cache(tokens, names_filter=is_pattern, config=CONFIG)
    return cache.nbytes


def run_floor(model: Any, tokens: torch.Tensor) -> int:
    for block in model.blocks:
        block.attn.forward = partial(attend_to_nothing, block.attn)
    model(tokens)
    return 0


def attend_to_nothing(attn: Any, query_input: Any, key_input: Any, value_input: Any, **_: Any) -> torch.Tensor:
    q, k, v = attn.calculate_qkv_matrices(query_input, key_input, value_input)
    attn.hook_rot_q(attn.apply_rotary(q)), attn.hook_rot_k(attn.apply_rotary(k))
    z = attn.hook_z(v.repeat_interleave(attn.repeat_kv_heads, 2))
    weight = einops.rearrange(attn.W_O, "head_index d_head d_model -> d_model (head_index d_head)")
    return F.linear(z.flatten(2), weight, attn.b_O)


RUNS: dict[str, Run] = {"dense": run_dense, "sparse": run_sparse, "floor": run_floor}


@torch.no_grad()
def check() -> list[str]:
    """What is wrong with the sparse run, against the dense model and the dense model under the run's layout; [] if nothing."""
    model = build_model(2048)
    tokens = torch.randint(0, 1000, (1, 1500), generator=torch.Generator().manual_seed(0))
    dense = model(tokens)
    tolerance = 1e-4 * dense.abs().max()
    wide = StreamConfig(**{**vars(CONFIG), "k": 24, "max_dense": 0})
    narrow = StreamConfig(**{**vars(CONFIG), "k": 4, "max_dense": 0})
    faults = []
    if (model.run_with_sparse_cache(tokens, config=wide)[0] - dense).abs().max() > tolerance:
        faults.append("with nothing pruned, the logits differ from the dense model's")
    logits, cache = model.run_with_sparse_cache(tokens, config=narrow)
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}

    def mask(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        return scores.masked_fill(~keep[hook.layer()], -torch.inf)

    masked = model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith("hook_attn_scores"), mask)])
    if (logits - masked).abs().max() > tolerance:
        faults.append("pruned, the logits differ from those of the masked dense model")
    if not cache.pruned > 0.5:
        faults.append(f"only {cache.pruned:.0%} of the token pairs were pruned")
    return faults


@torch.no_grad()
def measure(method: str, length: int, repeats: int) -> dict[str, Any]:
    """One row, in this process."""
    model = build_model(length)
    run = RUNS[method]
    generator = torch.Generator().manual_seed(0)
    run(model, torch.randint(0, 1000, (1, 512), generator=generator))
    tokens = torch.randint(0, 1000, (1, length), generator=generator)
    model(tokens[:, :1])
    before = resident("VmRSS")
    seconds, peak, cache_bytes = timed(lambda: run(model, tokens), repeats)
    return {
        "method": method,
        "tokens": length,
        "seconds": seconds,
        "peak_bytes": peak - before,
        "cache_bytes": cache_bytes,
        "repeats": repeats,
    }


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, int, Any]:
    """Median seconds of some runs, the highest resident set meanwhile in bytes, and what the last of them gave. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the highest resident set anew
    seconds, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), resident("VmHWM"), result


def resident(field: str) -> int:
    """This process's resident set now (VmRSS) or at its highest (VmHWM), in bytes. Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_own_process(method: str, length: int, repeats: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--row", method, str(length), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} at {length} tokens failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fits(method: str, length: int) -> bool:
    """Whether the machine has the memory: the dense model holds several tensors of heads x T x T."""
    if method != "dense":
        return True
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return DENSE_COPIES * 4 * length * length * 4 < 0.8 * available


def exponent(rows: list[dict[str, Any]], method: str, figure: str) -> float | None:
    """Slope of log(figure) over log(tokens) from `FIT_FROM` tokens on, by least squares; None for fewer than two rows."""
    points = [(math.log(r["tokens"]), math.log(r[figure])) for r in rows if r["method"] == method and r["tokens"] >= FIT_FROM]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def report(rows: list[dict[str, Any]], quick: bool) -> dict[str, Any]:
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), platform.processor())
    return {
        "rows": rows,
        "exponents": {m: {f: exponent(rows, m, f) for f in ("seconds", "peak_bytes")} for m in METHODS},
        "config": vars(CONFIG),
        "quick": quick,
        "hardware": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformer_lens": getattr(transformer_lens, "__version__", _version("transformer-lens")),
            "tl_stream": tl_stream.__version__,
        },
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title="Scaling with the number of tokens")
    for column in ("tokens", "method", "seconds", "x floor", "peak MB", "cache MB"):
        table.add_column(column, justify="right")
    floor = {row["tokens"]: row["seconds"] for row in result["rows"] if row["method"] == "floor"}
    for row in result["rows"]:
        times = row["seconds"] / floor[row["tokens"]]
        figures = f"{row['seconds']:.3f}", f"{times:.2f}", f"{row['peak_bytes'] / 1e6:.0f}", f"{row['cache_bytes'] / 1e6:.2f}"
        table.add_row(f"{row['tokens']:,}", row["method"], *figures)
    console = Console()
    console.print(table)
    for method, slopes in result["exponents"].items():
        console.print(f"{method}: " + ", ".join(f"{f} ~ tokens^{s:.2f}" for f, s in slopes.items() if s is not None))
    console.print(result["hardware"], result["versions"])


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 8,192 tokens, one repeat")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, exponents, hardware and versions there")
    parser.add_argument("--row", nargs=3, metavar=("METHOD", "TOKENS", "REPEATS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        method, length, repeats = options.row
        print(json.dumps(measure(method, int(length), int(repeats))))
        return 0
    faults = check()
    if faults:
        print("Not measured: " + "; ".join(faults), file=sys.stderr)
        return 1
    lengths = [n for n in LENGTHS if n <= 8192] if options.quick else LENGTHS
    jobs = [(method, n) for n in lengths for method in METHODS if fits(method, n)]
    rows = [in_own_process(method, n, 1 if options.quick else 3) for method, n in tqdm(jobs, desc="rows", file=sys.stderr)]
    result = report(rows, options.quick)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
