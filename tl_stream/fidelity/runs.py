"""The runs that a fidelity report compares: the same forward passes with and without pruning, neither with a T x T tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tl_stream.cache import SparseActivationCache
from tl_stream.config import StreamConfig
from tl_stream.hosts.unembedding import without_logits
from tl_stream.hosts.uninterrupted import Uninterrupted
from tl_stream.tracing import run_with_sparse_cache, sparse

WHITE_SPACE = 8  # how many tokens an answer may have beside those that carry text
_POINTS = ("hook_pattern", "hook_z", "hook_resid_post")


def dense_config(config: StreamConfig) -> StreamConfig:
    """A config that prunes nothing: the dense model, its attention streamed."""
    return replace(config, k=2**31, estimator="dual", layout_from=None, dense_queries=0, forward="sparse", decode="exact")


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def similarity(a: Float[Tensor, "*rows x"], b: Float[Tensor, "*rows x"]) -> Float[Tensor, "*rows"]:
    """Cosine similarity, in float32 or better."""
    return cosine_similarity(wide(a), wide(b), dim=-1)


def greedy_tokens(model: Any, prompt: Int[Tensor, "batch pos"], steps: int) -> Int[Tensor, "batch step"]:
    """The `steps` new tokens that a model generates greedily, also after an EOS."""
    output = model.generate(prompt, max_new_tokens=steps, do_sample=False, stop_at_eos=False, verbose=False)
    return output[:, prompt.shape[1] :]


def greedy_answers(model: Any, prompt: Int[Tensor, "batch pos"], n: int, at_most: int) -> tuple[tuple[int, ...], ...]:
    """What a model answers greedily, by text: up to the n-th token that carries text, or the one that ends the text.

    Tokens of white space, with which many tokenizers begin an answer, say nothing yet. Without a tokenizer every token counts.

    Args:
        model: The model, as it is to run.
        prompt: The texts.
        n: How many tokens with text make the answer.
        at_most: How many tokens fit behind the prompt; an answer has no more, and at most `WHITE_SPACE` more than n.
    """
    steps = n if model.tokenizer is None else min(n + WHITE_SPACE, at_most)
    return tuple(_answer(model.tokenizer, row, n) for row in greedy_tokens(model, prompt, steps).tolist())


def _answer(tokenizer: Any, tokens: list[int], n: int) -> tuple[int, ...]:
    if tokenizer is None:
        return tuple(tokens[:n])
    for i, token in enumerate(tokens):
        n -= _carries_text(tokenizer, token)
        if n == 0 or token == tokenizer.eos_token_id:
            return tuple(tokens[: i + 1])
    return tuple(tokens)


def thin_answers(tokenizer: Any, answers: Sequence[tuple[int, ...]], n: int) -> Iterator[str]:
    """The answers of fewer than n tokens that carry text, in words."""
    for i, answer in enumerate(() if tokenizer is None else answers):
        number = sum(_carries_text(tokenizer, token) for token in answer)
        if number < n:
            yield f"{number} of the {len(answer)} tokens {tokenizer.decode(answer)!r} of text {i} carry text, not {n}"


def _carries_text(tokenizer: Any, token: int) -> bool:
    """Whether a token is more than white space, and no special token."""
    return bool(tokenizer.decode([token], skip_special_tokens=True).strip())


@dataclass(frozen=True, eq=False)
class Run:
    """One forward pass.

    Attributes:
        final: What the unembedding was given.
        cache: Patterns, head outputs and residual streams.
    """

    final: Float[Tensor, "batch pos d_model"]
    cache: SparseActivationCache

    @classmethod
    def of(cls, model: Any, tokens: Int[Tensor, "batch pos"], config: StreamConfig, **kwargs: Any) -> Run:
        """Run the model."""
        kwargs["names_filter"] = lambda name: name.startswith("blocks.") and name.endswith(_POINTS)
        with without_logits(model) as given:
            _, cache = run_with_sparse_cache(model, tokens, config=config, **kwargs)
        assert isinstance(cache, SparseActivationCache)
        return cls(given[0], cache)

    def z(self, layer: int) -> Float[Tensor, "batch head_index pos d_v"]:
        """Head outputs."""
        heads = self.cache.patterns[layer].shape[1]
        return self.cache["z", layer].flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Continuation:
    """What a model generates greedily.

    Attributes:
        tokens: The new tokens, `[batch, step]`.
        resid: Residual stream after each layer, in the row that gives each token.
    """

    tokens: Int[Tensor, "batch step"]
    resid: Float[Tensor, "layer batch step d_model"]

    @classmethod
    def generated(cls, model: Any, prompt: Int[Tensor, "batch pos"], config: StreamConfig, steps: int) -> Continuation:
        """Let the model go on from the prompt on its own."""
        notes: dict[str, list[Tensor]] = {}

        def note(x: Tensor, hook: Any) -> None:
            notes.setdefault(hook.name, []).append(x[:, -1])

        with sparse(model, config, logits_to_keep=1), Uninterrupted(model.hooks(fwd_hooks=[(_is_resid, note)])):
            tokens = greedy_tokens(model, prompt, steps)
        return cls(tokens, torch.stack([torch.stack(x, 1) for x in notes.values()]))

    @classmethod
    def forced(cls, model: Any, prompt: Tensor, config: StreamConfig, tokens: Int[Tensor, "batch step"]) -> Continuation:
        """Make the model read given tokens in one pass, and see what it would have said at each."""
        text = torch.cat([prompt, tokens[:, :-1]], 1)
        with sparse(model, config, logits_to_keep=tokens.shape[1]):
            logits, cache = model.run_with_cache(text, names_filter=_is_resid, return_cache_object=False)
        resid = torch.stack([x[:, -tokens.shape[1] :] for x in cache.values()])
        return cls(logits.argmax(-1), resid)


def _is_resid(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith("hook_resid_post")
