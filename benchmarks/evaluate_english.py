"""How well the English model reads: `python benchmarks/evaluate_english.py [--model DIR]`.

1. Perplexity on the first 32,767 tokens of the held-out text, read in windows of 1,024, 8,192 and 32,768 tokens.
2. Induction scores: 256 random tokens come twice, next to each other or 8,192 tokens apart. A head's score is its mean
   attention from a token's second occurrence to what followed the first one (TransformerLens's and Olsson et al. 2022's).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from english.corpus import held_out_text
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from sources import ENGLISH_MODEL, Source, load_model, read_by
from torch import Tensor
from transformers import LlamaForCausalLM

import tl_stream

TOKENS = 32767
LENGTHS = (1024, 8192, 32768)
RUN = 256
DISTANCES = (256, 8192)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: Int[Tensor, " pos"], length: int, bos: int) -> float:
    """Of all tokens of a text that is read in windows of `length` tokens, BOS included."""
    total = 0.0
    for window in ids.split(length - 1):
        text = torch.cat([torch.tensor([bos]), window])[None]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(text, use_cache=False).last_hidden_state[0, :-1]
            parts = zip(hidden.split(4096), window.split(4096), strict=True)
            total += sum(F.cross_entropy(model.lm_head(x).float(), y, reduction="sum").item() for x, y in parts)
    return float(torch.tensor(total / len(ids)).exp())


def repeated(size: int, distance: int, bos: int) -> Int[Tensor, "1 pos"]:
    """Random tokens, others up to `distance`, the first ones again."""
    tokens = torch.randint(3, size, (distance,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor([bos]), tokens, tokens[:RUN]])[None]


def induction_scores(source: Source, distance: int) -> Float[Tensor, " head_index"]:
    """Mean attention from each token of the second run to what followed it in the first one."""
    keys = source.k[0].repeat_interleave(source.q.shape[1] // source.k.shape[1], 0)
    rows = torch.arange(1 + distance, distance + RUN)
    scores = source.q[0, :, rows] @ keys.transpose(-1, -2) * source.q.shape[-1] ** -0.5
    pattern = scores.masked_fill(torch.arange(keys.shape[1]) > rows[:, None], -torch.inf).softmax(-1)
    return pattern[:, torch.arange(len(rows)), rows - distance + 1].mean(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ENGLISH_MODEL)
    folder = parser.parse_args().model
    tokenizer = tl_stream.models.load_tokenizer(folder)
    size, bos = len(tokenizer), tokenizer.bos_token_id
    console, table = Console(), Table(title="Induction scores")
    for column in ("distance", "layer", *(f"head {head}" for head in range(4))):
        table.add_column(column, justify="right")
    for distance in DISTANCES:
        for layer, source in enumerate(read_by(load_model(folder), repeated(size, distance, bos), "repeated")):
            scores = induction_scores(source, distance).tolist()
            table.add_row(str(distance), str(layer), *(f"{score:.3f}" for score in scores))
    console.print(table)
    ids = torch.tensor(tokenizer(held_out_text(), add_special_tokens=False)["input_ids"])
    console.print(f"{len(ids):,} held-out tokens")
    model = tl_stream.models.load(folder, host="hf")
    for length in LENGTHS:
        console.print(f"perplexity in windows of {length:,}: {perplexity(model, ids[:TOKENS], length, bos):.1f}")


if __name__ == "__main__":
    main()
