"""Flips: a few inserted tokens after which the sparse model answers otherwise, while the dense one does not.

Sparse attention drops a little of what is read, and that little can decide an answer. How easily, a search says: over
tokens inserted at the start of a prompt, at random, or along the gradient (greedy coordinate gradient: Zou et al. 2023,
arXiv:2307.15043, section 2). The dense model must answer as it does without them, and so must the sparse model without them:
what it flips on its own is no work of tokens, and no tokens are searched for. What was found is then run again at half the
budget and at growing ones: a flip is an artefact of sparsity if it is still there below, and gone above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_stream.analysis.checks import check_count
from tl_stream.analysis.flip_case import Case
from tl_stream.analysis.flip_result import Flips
from tl_stream.analysis.insertions import METHODS, RandomTokens
from tl_stream.config import StreamConfig
from tl_stream.hosts.hooks import as_prompt


@torch.no_grad()
def find_flips(
    model: Any,
    prompts: Sequence[Any],
    config: StreamConfig,
    *,
    match: int = 1,
    n_tokens: int = 3,
    method: str = "random",
    trials: int = 256,
    batch_size: int = 16,
    position: int | None = None,
    vocabulary: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Flips:
    """Search for tokens whose insertion makes sparse and dense answers differ, and see what the audit says of such runs.

    Args:
        model: A causal HookedTransformer or TransformerBridge.
        prompts: Texts, or token tensors `[pos]` or `[1, pos]`.
        config: The sparse model; `k` must be a number of blocks.
        match: How many tokens that carry text make the answer, as in `find_budget`.
        n_tokens: How many tokens are inserted.
        method: `"random"`, or `"gcg"`: single tokens are exchanged along the gradient.
        trials: The most insertions to try on a prompt.
        batch_size: How many are run at once.
        position: Where they are inserted; None: at the start, after a BOS token.
        vocabulary: Token ids to choose from; None: all but the tokenizer's special ones.
        seed: Of the search.
        progress: Show a progress bar.

    Returns:
        One entry a prompt, also where no flip was found: then the insertion that came nearest to one; or none, where the sparse
        model answers otherwise without any.

    Raises:
        TypeError: A `k` that is no number, or a prompt that is neither text nor tokens.
        ValueError: No prompts, `forward="exact"`, an unknown method, a number below 1, a position outside a prompt, an empty
            vocabulary, or a prompt that is too long with what is added to it.

    Warns:
        UserWarning: Fewer than `match` tokens of a dense answer carry text.
    """
    _check(prompts, config, method, vocabulary, match=match, n_tokens=n_tokens, trials=trials, batch_size=batch_size)
    ids = torch.tensor(_vocabulary(model) if vocabulary is None else list(vocabulary))
    found = []
    for i, prompt in enumerate(tqdm(prompts, desc="find_flips", unit="prompt", disable=not progress)):
        generator = torch.Generator().manual_seed(seed + i)
        case = Case(model, as_prompt(model, prompt), config, match, n_tokens, position)
        unattacked = case.unattacked()
        if unattacked.same:
            inserted, tried = _search(case, METHODS[method](case, ids, generator), trials, batch_size)
            found.append(case.examine(i, unattacked, inserted, tried))
        else:
            found.append(case.flipped_alone(i, unattacked))
    return Flips(tuple(found), config, method)


def _search(case: Case, proposer: RandomTokens, trials: int, batch_size: int) -> tuple[Int[Tensor, " token"], int]:
    """The first insertion that flips the sparse model alone, or the one that came nearest; and how many were tried."""
    best, least, tried = None, math.inf, 0
    while tried < trials:
        candidates = proposer.propose(best, min(batch_size, trials - tried))
        tried += len(candidates)
        margins = case.run(candidates, case.config)
        flipped = candidates[margins < 0]
        if len(flipped):
            unharmed = flipped[case.run(flipped, case.dense) >= 0]
            if len(unharmed):
                return unharmed[0], tried
        margins = margins.masked_fill(margins < 0, torch.inf)  # these flip the dense model, too
        if best is None or margins.min() < least:
            best, least = candidates[margins.argmin()], float(margins.min())
    assert best is not None
    return best, tried


def _vocabulary(model: Any) -> list[int]:
    special = set() if model.tokenizer is None else set(model.tokenizer.all_special_ids)
    return [token for token in range(model.cfg.d_vocab) if token not in special]


def _check(prompts: Any, config: StreamConfig, method: str, vocabulary: Sequence[int] | None, **counts: Any) -> None:
    if isinstance(prompts, str | Tensor) or not len(prompts):
        raise ValueError(f"prompts was {prompts!r}; expected a list of at least one text or token tensor.")
    if not isinstance(config.k, int):
        raise TypeError(f"config.k was {config.k!r}; expected a number of blocks, which can be halved and doubled.")
    if config.forward == "exact":
        raise ValueError("config had forward='exact', which leaves the model dense; expected forward='sparse'. Leave it out.")
    if method not in METHODS:
        raise ValueError(f"method was {method!r}; expected one of {', '.join(map(repr, METHODS))}.")
    if vocabulary is not None and not len(vocabulary):
        raise ValueError("vocabulary was empty; expected token ids to insert, or None for all but special ones.")
    for name, value in counts.items():
        check_count(name, value)
