"""`fidelity`: a sparse run against the dense model, head by head, layer by layer and at the output.

The dense model runs with its attention streamed (`StreamConfig.k` covering every block), so that memory stays linear in the
length of the text; its time is quadratic, as is the comparison of all rows.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_stream.audit.rows import SoftmaxRows
from tl_stream.config import StreamConfig, as_config
from tl_stream.fidelity.output import compare_outputs
from tl_stream.fidelity.result import Fidelity, HeadFidelity, LayerFidelity
from tl_stream.fidelity.runs import Continuation, Run, dense_config, similarity
from tl_stream.fidelity.streamed import PatternComparison, compare_patterns
from tl_stream.hosts import host_of


@torch.no_grad()
def fidelity(
    model: Any,
    tokens: Int[Tensor, "batch pos"] | str,
    config: StreamConfig | None = None,
    *,
    rows: int | None = None,
    new_tokens: int = 8,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Fidelity:
    """Compare a sparse run with the dense model: patterns, head outputs, residual streams, logits and generated text.

    Exact, in memory linear in the length: no T x T tensor, and logits of some positions at a time.

    Args:
        model: A model that `supports` accepts.
        tokens: Texts `[batch, pos]`, or one text.
        config: The sparse run; None: the defaults.
        rows: Compare about so many rows of each pattern: evenly spaced query blocks, the last among them. O(T) a row and
            head. None: all.
        new_tokens: How many tokens both generate greedily; 0: none.
        attention_mask: 0 where a token is padding. Generation takes none: pass `new_tokens=0` with it.

    Raises:
        TypeError: `model`, `tokens` or `config` is of the wrong type.
        ValueError: An argument is out of range, or as `tl_stream.sparse`.
    """
    host_of(model)
    config = as_config(config)
    text = model.to_tokens(tokens, truncate=False) if isinstance(tokens, str) else tokens
    _check(model, text, rows, new_tokens, attention_mask)
    text = text.to(model.cfg.device)
    kwargs = {} if attention_mask is None else {"attention_mask": attention_mask}
    dense, sparse = (Run.of(model, text, each, **kwargs) for each in (dense_config(config), config))
    along = _along(model, text, config, new_tokens) if new_tokens else None
    heads, compared = _heads(dense, sparse, rows)
    counted = torch.ones_like(text) if attention_mask is None else attention_mask.to(text.device)
    said = None if along is None else (along[0].tokens, along[1].tokens)
    output = compare_outputs(model, dense.final, sparse.final, text, counted.bool(), said)
    return Fidelity(
        tokens=text.shape[1],
        texts=len(text),
        rows=compared,
        pruned=sparse.cache.pruned,
        pruned_causal=sparse.cache.pruned_causal,
        heads=heads,
        layers=_layers(dense, sparse, along, counted.bool()),
        output=output,
    )


def _heads(dense: Run, sparse: Run, rows: int | None) -> tuple[tuple[HeadFidelity, ...], int]:
    """Every head, and how many rows were compared."""
    found: list[HeadFidelity] = []
    compared = 0
    for layer, pattern in sorted(sparse.cache.patterns.items()):
        pair = SoftmaxRows.of(dense.cache.patterns[layer]), SoftmaxRows.of(pattern)
        blocks = _blocks(pattern.block_layout.n_q_blocks, pattern.block_layout.block_q, rows, pattern.device)
        patterns = compare_patterns(*pair, blocks)
        z = similarity(dense.z(layer)[:, :, patterns.rows], sparse.z(layer)[:, :, patterns.rows])
        found += [_head(layer, head, patterns, z[:, head]) for head in range(pattern.shape[1])]
        compared = len(patterns.rows)
    return tuple(found), compared


def _blocks(n_blocks: int, block_q: int, rows: int | None, device: torch.device) -> Int[Tensor, " q_block"]:
    """Query blocks of about `rows` rows, evenly spaced, the last one among them."""
    number = n_blocks if rows is None else min(n_blocks, -(-rows // block_q))
    return torch.arange(1, number + 1, device=device) * n_blocks // number - 1


def _head(layer: int, head: int, found: PatternComparison, z: Float[Tensor, "batch row"]) -> HeadFidelity:
    counted = found.counted
    retained = found.retained[:, head][counted]
    worst = int(retained.argmin())
    return HeadFidelity(
        layer=layer,
        head=head,
        retained_mean=float(retained.mean()),
        retained_5th=float(torch.quantile(retained[: 2**24].double(), 0.05)),
        retained_least=float(retained[worst]),
        worst_row=int(found.rows.expand(counted.shape)[counted][worst]),
        block_recall=float(found.blocks[:, head].mean()),
        entry_recall=float(found.entries[:, head][counted].mean()),
        top_kept=float(found.top_kept[:, head][counted].mean()),
        top_same=float(found.top_same[:, head][counted].mean()),
        pattern_cosine=float(found.cosine[:, head][counted].mean()),
        output_cosine=float(z[counted].mean()),
    )


def _along(model: Any, text: Tensor, config: StreamConfig, steps: int) -> tuple[Continuation, Continuation, Continuation]:
    """What the dense and the sparse model generate, and the sparse model reading what the dense one said."""
    dense = Continuation.generated(model, text, dense_config(config), steps)
    return dense, Continuation.generated(model, text, config, steps), Continuation.forced(model, text, config, dense.tokens)


def _layers(
    dense: Run, sparse: Run, along: tuple[Continuation, ...] | None, counted: Bool[Tensor, "batch pos"]
) -> tuple[LayerFidelity, ...]:
    names = [name for name in dense.cache if name.endswith("hook_resid_post")]
    found = []
    for index, name in enumerate(names):
        prompt = similarity(dense.cache[name], sparse.cache[name])[counted]
        steps = [_along_steps(along[0], other, index) for other in along[1:]] if along else [(), ()]
        layer = int(name.split(".")[1])
        found.append(LayerFidelity(layer, float(prompt.mean()), float(prompt.min()), *steps))
    return tuple(found)


def _along_steps(dense: Continuation, other: Continuation, index: int) -> tuple[float, ...]:
    """Similarity at each step, mean over texts."""
    return tuple(similarity(dense.resid[index], other.resid[index]).mean(0).tolist())


def _check(model: Any, text: Any, rows: Any, new_tokens: Any, attention_mask: Any) -> None:
    if not isinstance(text, Tensor) or text.dim() != 2 or not text.numel():
        shape = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
        raise TypeError(f"tokens was {shape}; expected tokens [batch, pos] with at least one of each, or one text (a str).")
    if rows is not None and rows < 1:
        raise ValueError(f"rows was {rows}; expected how many rows to compare, an int >= 1, or None for all.")
    if new_tokens < 0:
        raise ValueError(f"new_tokens was {new_tokens}; expected an int >= 0.")
    if attention_mask is not None and new_tokens:
        raise ValueError(
            f"new_tokens was {new_tokens} with an attention_mask, which generation takes none of; pass new_tokens=0."
        )
    length = text.shape[1] + max(0, new_tokens - 1)
    if length > model.cfg.n_ctx:
        raise ValueError(
            f"tokens and new_tokens would make a text of {length} tokens; expected at most the {model.cfg.n_ctx} of n_ctx. "
            "Pass fewer of either."
        )
