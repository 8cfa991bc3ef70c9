"""Which attention does `stream` lose, and at which of its steps?

    PYTHONPATH=benchmarks python -m real.stream_losses FOLDER ROWS [--tokens N ...] [--k N]

On the dense model's own q and k, on the prose of `real.fidelity`, blocks of 32 x 32. For every head, in the mean over its rows,
the share of attention on the blocks that

- `exact` keeps (the best ones), `stream` keeps, `stream` keeps with `keep_sink=True`, and `window` keeps;
- would be the best of the leaves that `stream`'s tree arrives at (twice its budget), were they scored exactly: what is missing
  there was lost on the way down the tree, the rest by the last ranking, which goes by a leaf's mean key;
- `exact` keeps and `stream` doesn't, by where they lie: the text's first block (the sink), the two blocks before the query
  block's own one, and all others. (The own block is always kept.) What `stream` keeps instead makes up for some of it.

For the lost blocks and for those that both keep it says, too, which share of their attention is on a block's most read key: a
leaf's mean key divides by 32 what one key has that the others have not. And the keys with most of the lost attention, by name.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from real.common import load, once, rows, versions
from real.fidelity import BLOCK, DENSE, Run, by_key, chosen, kind_of, prose
from tl_stream import StreamConfig
from tl_stream.audit import records
from tl_stream.audit.rows import SoftmaxRows
from tl_stream.estimator import Limits, Problem, block_shares

NEAR = 2  # blocks before the own one
MOST_KEYS = 8
PLACES = ("first block", f"{NEAR} before the own", "elsewhere")
WAYS = ("exact", "stream", "stream, first block kept", "window")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of a model, as save_pretrained writes it")
    parser.add_argument("rows", type=Path, help="finished cases, JSON lines")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="lengths of the text (%(default)s)")
    parser.add_argument("--k", type=int, default=8, help="blocks kept (%(default)s)")
    options = parser.parse_args()
    model, name = load(options.folder), Path(options.folder).name
    for tokens in options.tokens:
        about = {"model": name, "tokens": tokens, "k": options.k, "block": BLOCK}
        once(options.rows, about, partial(losses, model, tokens, options.k))
    for shown in (table, layers_table, heads_table, keys_table):
        Console(width=140).print(shown(rows(options.rows)))
    return 0


@torch.inference_mode()
def losses(model: Any, tokens: int, k: int) -> dict[str, Any]:
    """Of every head, where `stream` loses attention; and the keys that lose most, by kind of layer."""
    text = prose(model, tokens)
    patterns = Run.of(model, text, DENSE).patterns
    heads: list[dict[str, Any]] = []
    keys: dict[str, Tensor] = defaultdict(lambda: torch.zeros(tokens))
    for layer in tqdm(patterns, file=sys.stderr):
        of_layer, lost = layer_losses(patterns[layer], layer, k)
        heads += of_layer
        keys[of_layer[0]["kind"]] += lost
    columns = {name: [head[name] for head in heads] for name in heads[0]}
    lost_keys = {kind: named(lost, text[0], model.tokenizer) for kind, lost in keys.items()}
    return {"heads": columns, "lost keys": lost_keys, "versions": versions()}


def named(lost: Float[Tensor, " key_pos"], text: Int[Tensor, " pos"], tokenizer: Any) -> list[tuple[int, str, float]]:
    """The keys of which most is lost: position, token, and share of all that is lost."""
    best = (lost / lost.sum()).topk(MOST_KEYS)
    return [
        (position, tokenizer.decode(text[position]), round(share, 5))
        for share, position in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def layer_losses(pattern: Any, layer: int, k: int) -> tuple[list[dict[str, Any]], Float[Tensor, " key_pos"]]:
    """Of every head of a layer; and what is lost of each key, summed over heads and query blocks."""
    base, keys = StreamConfig(block_q=BLOCK, block_k=BLOCK, k=k, estimator="stream"), by_key(pattern).unflatten(-1, (-1, BLOCK))
    held, most_read = keys.sum(-1), keys.amax(-1)
    ways = (replace(base, estimator="exact"), base, replace(base, keep_sink=True), replace(base, estimator="window"))
    layouts = [chosen(pattern, config, layer) for config in ways]
    best, stream, *_ = kept = [layout.to_block_dense()[0] for layout in layouts]
    found = {name: total(held, each) for name, each in zip(WAYS, kept, strict=True)}
    found["best of the leaves"] = of_best(held, leaves(pattern, base), stream)
    for name, where in places(held).items():
        found[f"lost: {name}"] = total(held, best & ~stream & where)
        found[f"gained: {name}"] = total(held, stream & ~best & where)
    for name, where in {"lost": best & ~stream, "kept": best & stream}.items():
        found[f"{name}: blocks"], found[f"{name}: most read keys"] = total(held, where), total(most_read, where)
    plain = {name: [round(x, 5) for x in values.tolist()] for name, values in found.items()}
    about = {"layer": layer, "kind": kind_of(layouts[0])}
    heads = [{**about, "head": head, **{name: each[head] for name, each in plain.items()}} for head in range(len(held))]
    return heads, (keys * (best & ~stream)[..., None]).sum((0, 1)).flatten()


def total(held: Float[Tensor, "head_index q_block kv_block"], where: Bool[Tensor, "*#shape"]) -> Float[Tensor, " head_index"]:
    """The share of attention on some blocks, mean over rows."""
    return (held * where).sum(-1).mean(-1)


def places(held: Float[Tensor, "head_index q_block kv_block"]) -> dict[str, Bool[Tensor, "q_block kv_block"]]:
    """Which blocks lie where, by the names in `PLACES`."""
    q_block, kv_block = (torch.arange(n) for n in held.shape[1:])
    behind = q_block[:, None] - kv_block
    first, near = (kv_block == 0).expand(behind.shape), (behind > 0) & (behind <= NEAR)
    return dict(zip(PLACES, (first, near & ~first, ~near & ~first & (behind > 0)), strict=True))


def of_best(
    held: Float[Tensor, "head_index q_block kv_block"], among: Bool[Tensor, "*shape"], kept: Bool[Tensor, "*shape"]
) -> Float[Tensor, " head_index"]:
    """The share of attention on the best of some blocks, as many as were kept."""
    number = kept.sum(-1, keepdim=True)
    ranked = (held * among).sort(-1, descending=True).values
    return total(ranked, torch.arange(held.shape[-1]) < number)


def leaves(pattern: Any, config: StreamConfig) -> Bool[Tensor, "head_index q_block kv_block"]:
    """The candidates that the estimator ranks last; the own block, which is kept anyway, is one."""
    full = SoftmaxRows.of(pattern)
    given, layout = full.products, full.layout
    problem = Problem.of(given.q, given.k, layout.mask, BLOCK, BLOCK, given.scale, given.score_mods)
    limits = Limits(problem, [config.budget] * layout.n_heads)
    found = torch.eye(layout.n_q_blocks, layout.n_kv_blocks, dtype=torch.bool).repeat(layout.n_heads, 1, 1)
    for _, part, blocks, shares in block_shares(problem, config, limits):
        counts = torch.zeros(found[:, part].shape, dtype=torch.int32)
        counts = counts.scatter_add(-1, blocks[0].expand(shares[0].shape), (shares[0] >= 0).int())
        found[:, part] |= counts > 0
    return found


def table(cases: list[dict[str, Any]]) -> Any:
    """Mean over the heads of each kind of layer."""
    lines = []
    for row in cases:
        kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for head in heads_of(row):
            kinds[head["kind"]].append(head)
        for kind, heads in kinds.items():
            lines.append((row["model"], row["tokens"], f"{kind} ({len(heads)})", *figures(heads)))
    title = "Where stream loses attention (mean over heads; shares of all attention)"
    return records.table(title, ("model", "tokens", "heads", *HEADER), lines)


def layers_table(cases: list[dict[str, Any]]) -> Any:
    """What each layer loses, less what is kept instead; and how much is lost at the first block and elsewhere."""
    lines = []
    for row in cases:
        heads = heads_of(row)
        for layer in sorted(set(row["heads"]["layer"])):
            own = [head for head in heads if head["layer"] == layer]
            exact, stream, *_, first, near, elsewhere, _, _, _ = figures(own)
            about = (row["model"], row["tokens"], f"{layer} ({own[0]['kind']})")
            lines.append((*about, exact, stream, exact - stream, first, near + elsewhere))
    header = ("model", "tokens", "layer", "exact", "stream", "difference", "lost: first block", "elsewhere")
    return records.table("What stream loses in each layer, mean over its heads", header, lines)


def heads_table(cases: list[dict[str, Any]], most: int = 5) -> Any:
    """The heads that lose most."""
    lines = []
    for row in cases:
        for head in sorted(heads_of(row), key=lambda head: head["stream"] - head["exact"])[:most]:
            name = f"{head['layer']}.{head['head']} ({head['kind']})"
            lines.append((row["model"], row["tokens"], name, *figures([head])))
    return records.table("The heads of which stream loses most", ("model", "tokens", "head", *HEADER), lines)


def heads_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A case's heads, which its row holds by column."""
    return [dict(zip(row["heads"], values, strict=True)) for values in zip(*row["heads"].values(), strict=True)]


HEADER = ("exact", "stream", "+ first", "window", "lost: tree", "ranking", *PLACES, "gained", "on one key: lost", "kept")


def figures(heads: list[dict[str, Any]]) -> list[float]:
    """What `HEADER` names, mean over heads."""

    def mean(name: str) -> float:
        return sum(head[name] for head in heads) / len(heads)

    gained = sum(mean(f"gained: {place}") for place in PLACES)
    steps = [mean("exact") - mean("best of the leaves"), mean("best of the leaves") - mean("stream")]
    on_one = [mean(f"{name}: most read keys") / max(mean(f"{name}: blocks"), 1e-9) for name in ("lost", "kept")]
    return [*(mean(way) for way in WAYS), *steps, *(mean(f"lost: {place}") for place in PLACES), gained, *on_one]


def keys_table(cases: list[dict[str, Any]]) -> Any:
    """The keys with most of what is lost."""
    lines = []
    for row in cases:
        for kind, keys in row["lost keys"].items():
            shown = "  ".join(f"{position} {token!r} {share:.1%}" for position, token, share in keys)
            lines.append((row["model"], row["tokens"], kind, sum(share for *_, share in keys), shown))
    header = ("model", "tokens", "heads", f"the first {MOST_KEYS}, together", "position, token, share of what is lost")
    return records.table("The keys of which stream loses most", header, lines)


if __name__ == "__main__":
    raise SystemExit(main())
