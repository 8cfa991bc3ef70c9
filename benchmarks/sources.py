"""Queries and keys to compare estimators on: text read by trained models, and constructed heads that are hard to estimate.

Every source is a layer's (or a constructed layer's) post-rotary q and k, and which of its queries count.
Nothing here makes a T x T tensor; text of 32k tokens takes the time of full attention, not its memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from english.corpus import held_out_text
from jaxtyping import Float, Int
from torch import Tensor

import tl_stream
from tl_stream import StreamConfig
from tl_stream.fidelity.runs import dense_config
from tl_stream.tasks import niah, niah_single_1, reasoning_trace, variable_tracking

ENGLISH_MODEL = Path(__file__).parent / "english" / "model"
FULL_ATTENTION = dense_config(StreamConfig(max_dense=0))
SENTENCE_TOKENS = 20


@dataclass(frozen=True)
class Source:
    """What an estimator is given, and the queries to judge it by.

    Attributes:
        name: Where it comes from.
        q: Queries, after any rotary embedding.
        k: Keys, likewise; grouped as the model groups them.
        readers: The queries that count: all of them, but in constructed heads those that want something in particular.
    """

    name: str
    q: Float[Tensor, "batch head_index query_pos d_head"]
    k: Float[Tensor, "batch kv_head_index key_pos d_head"]
    readers: Int[Tensor, " reader"]


@dataclass(frozen=True)
class Constructed(Source):
    """A source of which is known which key each of the readers wants: `wanted`."""

    wanted: Int[Tensor, " reader"]


def english(tokens: int, part: int = 0) -> list[Source]:
    """The layers of the English model on a stretch of the held-out text; `part` counts stretches of this length.

    Raises ValueError where the text has no such stretch.
    """
    model = load_model(ENGLISH_MODEL)
    ids = english_ids()
    start, stop = part * (tokens - 1), (part + 1) * (tokens - 1)
    if stop > len(ids):
        raise ValueError(f"part: {part} of {tokens} tokens ends at {stop}; expected it within the text's {len(ids)} tokens")
    text = torch.tensor([[model.tokenizer.bos_token_id, *ids[start:stop]]])
    return read_by(model, text, f"English {tokens}")


def bundled_tasks(tokens: int, seed: int = 0) -> list[Source]:
    """The layers of the bundled model on each of its tasks, at about that many tokens."""
    model = load_model("mini")
    prompts = {
        "needle": niah_single_1(model.tokenizer, tokens, seed=seed).prompt,
        "needles": niah(model.tokenizer, tokens, keys=4, seed=seed).prompt,
        "variables": variable_tracking(model.tokenizer, tokens, seed=seed).prompt,
        "reasoning": reasoning_trace(model.tokenizer, tokens // SENTENCE_TOKENS, seed=seed).text,
    }
    texts = {task: torch.tensor([model.tokenizer(prompt)["input_ids"]]) for task, prompt in prompts.items()}
    return [source for task, text in texts.items() for source in read_by(model, text, f"{task} {text.shape[1]}")]


def induction(
    tokens: int = 8192, heads: int = 2, d_head: int = 64, strength: float = 1.5, shuffled: bool = False, seed: int = 0
) -> Constructed:
    """Heads that look for what followed the same token earlier (arXiv:2209.11895), in random tokens of which each comes twice.

    A key is the (random) embedding of the token before it, a query `strength` times the embedding of its own: scores are
    about normal with that standard deviation, except for the wanted key's, `strength * sqrt(d_head)`. With 1.5 and 64 that key
    holds 87 % of a query's attention at 8,192 tokens.

    Args:
        tokens: Length; the first half has every token once, the second half again.
        heads: Heads, each with embeddings of its own.
        d_head: Size of keys and queries.
        strength: Standard deviation of the scores of unwanted keys.
        shuffled: Whether the second half has the tokens in another order, so that the queries of a block want keys in as many
            places; else the queries of a block want neighbouring keys.
        seed: The same seed gives the same heads.
    """
    generator = torch.Generator().manual_seed(seed)
    half = tokens // 2
    embedding = directions(torch.randn(1, heads, half, d_head, generator=generator))
    order = torch.randperm(half, generator=generator) if shuffled else torch.arange(half)
    text = torch.cat([torch.arange(half), order])
    first = directions(torch.randn(1, heads, 1, d_head, generator=generator))
    return Constructed(
        name=f"induction {tokens}" + ", shuffled" * shuffled,
        q=strength * embedding[:, :, text],
        k=torch.cat([first, embedding[:, :, text[:-1]]], 2),
        readers=torch.arange(half, tokens),
        wanted=order + 1,
    )


def needle(
    tokens: int = 32768, readers: int = 1, block: int = 32, heads: int = 1, d_head: int = 64, norm: float = 1.75, seed: int = 0
) -> Constructed:
    """One key among random ones, wanted by the first `readers` queries of every block of queries in the text's second half.

    Keys and queries have random directions. The needle's key is `norm` times as long as the others, and a reader points the
    same way: its score is `norm * sqrt(d_head)` where others are about normal with standard deviation 1. With 1.75 and 64 the
    needle holds 96 % of a reader's attention at 32,768 tokens. It lies in the middle of the first half, at no block's edge
    and no block's centre.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k = directions(torch.randn(2, 1, heads, tokens, d_head, generator=generator))
    place = tokens // 4 + block // 4 + 1
    half = torch.arange(tokens // 2, tokens)
    reading = half[half % block < readers]
    q[:, :, reading] = k[:, :, place : place + 1]
    k[:, :, place] *= norm
    return Constructed(f"needle {tokens}, {readers} of {block}", q, k, reading, torch.full_like(reading, place))


def directions(x: Float[Tensor, "*dims d_head"]) -> Float[Tensor, "*dims d_head"]:
    """The same directions, every vector with a root mean square of 1."""
    return x / x.square().mean(-1, keepdim=True).sqrt()


def read_by(model: Any, text: Int[Tensor, "1 pos"], name: str) -> list[Source]:
    """Every layer's q and k while the model reads a text with full attention."""

    def is_rotated(hook: str) -> bool:
        return hook.endswith((".hook_rot_q", ".hook_rot_k"))

    with torch.no_grad():
        _, run = model.run_with_sparse_cache(text, config=FULL_ATTENTION, names_filter=is_rotated, logits_to_keep=1)

    def heads_first(hook: str, layer: int) -> Tensor:
        return run[f"blocks.{layer}.attn.{hook}"].transpose(1, 2)

    readers = torch.arange(text.shape[1])
    return [
        Source(f"{name}, layer {layer}", heads_first("hook_rot_q", layer), heads_first("hook_rot_k", layer), readers)
        for layer in range(model.cfg.n_layers)
    ]


@cache
def load_model(name: str | Path) -> Any:
    return tl_stream.models.load(name)


@cache
def english_ids() -> list[int]:
    return load_model(ENGLISH_MODEL).tokenizer(held_out_text(), add_special_tokens=False)["input_ids"]
