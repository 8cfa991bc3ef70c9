"""The smallest budget with which the sparse model still does what the dense one does.

Stream takes the smallest k with which greedy generation gives the dense model's next two tokens (Rosser et al. 2025,
arXiv:2510.19875, section 3). Here:

1. The dense model runs once, streamed with a full layout: no T x T tensor. Its answer is compared up to the second token that
   carries text: a space before it says nothing. For a total it is measured there, too, what the best blocks of each head hold.
2. The budget doubles from the smallest until the criterion is met: O(log k) runs.
3. Bisection between the last one that failed and the first that met it: O(log k) runs.
4. The neighbours of what was found are tried, too. The criterion need not be monotone: more blocks can also mislead. What
   was found is then the smallest of those tried, and the result says so.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_stream.config import StreamConfig, as_config
from tl_stream.fidelity.budget_result import BudgetSearch, Evaluation
from tl_stream.fidelity.criteria import METRICS, Criterion, Metric, SameTokens, SmallMetric
from tl_stream.fidelity.runs import WHITE_SPACE, dense_config, thin_answers
from tl_stream.fidelity.searched import Choose, Searched
from tl_stream.hosts.hooks import as_prompt


@torch.no_grad()
def find_budget(
    model: Any,
    tokens: Any,
    match: int = 2,
    *,
    metric: str | Metric | None = None,
    threshold: float | None = None,
    config: StreamConfig | None = None,
    over: str | Choose = "k",
    low: int | None = None,
    high: int | None = None,
    progress: bool = True,
) -> BudgetSearch:
    """The smallest budget with which the sparse model does what the dense one does, on one prompt.

    Args:
        model: A causal HookedTransformer or TransformerBridge.
        tokens: The prompt: `[batch, pos]` or `[pos]`, or text. All texts of a batch have to meet the criterion.
        match: How many tokens that carry text have to be the dense model's in greedy generation, with those of white space
            before and between them; `criterion` of the result quotes them. An end-of-text token ends what is compared, and
            without a tokenizer every token counts. (Not used with a `metric`.)
        metric: Instead: `"kl"`, `"logit_difference"` or a function of the sparse and the dense model's logits at the last
            position, `[batch, 1, d_vocab]`; smaller is better.
        threshold: The largest value of the metric that will do.
        config: Everything but the budget; None: the defaults. Steps of generation are sparse as it says. Neither
            `forward="exact"` nor `layout_from`, with which all budgets compute the same.
        over: What the budget is a number of. `"k"`: key blocks kept for each query block and head. `"total"`: key blocks over
            all heads of a query block, distributed over layers and heads by the attention that they hold in the dense run (see
            `distribute`; `config.dense_layers` get none). `"top_p"`: per cent of each row's attention, as `TopP` reckons it.
            Or a function from an int to the config for it, with more kept for larger ones (for a grid, of its index).
        low: The smallest budget to try; None: the smallest that `config` allows (1 for a function).
        high: The largest one; None: the one that keeps everything, which is the dense model (for a function, the number of key
            blocks).
        progress: Show a progress bar.

    Returns:
        The config found, and all that was tried. At most about `2 log2(high)` sparse runs of the model, and one dense one.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: No tokens, a `match` below 1 or beyond n_ctx, an empty range, an unknown `over`, or one for which the
            estimator reckons no shares of attention; a `config` with `forward="exact"` or `layout_from`; a metric without a
            threshold, an unknown one or one that gives NaN.

    Warns:
        UserWarning: A larger budget failed than the one found; or fewer than `match` of the tokens compared carry text.
    """
    config = as_config(config)
    _check_config(config)
    prompt = as_prompt(model, tokens)
    _check_match(match, prompt, model.cfg.n_ctx)
    steps = 0 if metric is not None else min(match + WHITE_SPACE, model.cfg.n_ctx - prompt.shape[1]) - 1
    searched = Searched.of(over, model, config, -(-(prompt.shape[1] + steps) // config.block_k)).within(low, high)
    with nullcontext() if searched.shares is None else searched.shares.measured(model):
        criterion = _criterion(model, prompt, match, metric, threshold, dense_config(config))
    for said in thin_answers(model.tokenizer, criterion.dense_tokens or (), match):
        warnings.warn(
            f"The criterion ({criterion.description}) says little: {said}. A budget that matches white space or an early end "
            "may lose the answer; look at the prompt, or give a metric.",
            stacklevel=3,  # torch.no_grad adds a frame
        )
    with tqdm(desc="find_budget", disable=not progress, unit="run") as bar:
        tried = _Tried(criterion, searched, bar)
        _search(tried, searched.low, searched.high)
    evaluations = tuple(tried.evaluations[budget] for budget in sorted(tried.evaluations))
    best = next((each.budget for each in evaluations if each.matched), None)
    found = None if best is None else searched.config(best)
    result = BudgetSearch(found, evaluations, criterion.description, searched.name, criterion.dense_tokens)
    if not result.is_monotone:
        failed = [each.budget for each in evaluations if not each.matched and best is not None and each.budget > best]
        warnings.warn(
            f"{searched.name} = {best} meets the criterion ({criterion.description}), but larger ones fail: {failed}. It is "
            "not monotone here; treat the budget as specific to this prompt, or ask for a longer match.",
            stacklevel=3,  # torch.no_grad adds a frame
        )
    return result


class _Tried:
    """Evaluates each budget once."""

    def __init__(self, criterion: Criterion, searched: Searched, bar: Any) -> None:
        self.criterion, self.searched, self.bar = criterion, searched, bar
        self.evaluations: dict[int, Evaluation] = {}

    def matches(self, budget: int) -> bool:
        """Whether a budget meets the criterion."""
        if budget not in self.evaluations:
            self.bar.set_postfix({self.searched.name: budget})
            self.evaluations[budget] = self.criterion.evaluate(budget, self.searched.config(budget))
            self.bar.update()
        return self.evaluations[budget].matched


def _search(tried: _Tried, low: int, high: int) -> None:
    """Double, bisect, and try the neighbours."""
    failed, budget = low - 1, low
    while not tried.matches(budget):
        if budget == high:
            return
        failed, budget = budget, min(2 * budget, high)
    while budget - failed > 1:
        middle = (failed + budget) // 2
        failed, budget = (failed, middle) if tried.matches(middle) else (middle, budget)
    for neighbour in (budget - 1, budget + 1):
        if low <= neighbour <= high:
            tried.matches(neighbour)


def _criterion(
    model: Any, prompt: Tensor, match: int, metric: str | Metric | None, threshold: float | None, dense: StreamConfig
) -> Criterion:
    if metric is None:
        return SameTokens(model, prompt, match, dense)
    if isinstance(metric, str) and metric not in METRICS:
        raise ValueError(f"metric was {metric!r}; expected one of {', '.join(map(repr, METRICS))}, or a function.")
    if not isinstance(metric, str) and not callable(metric):
        raise TypeError(f"metric was a {type(metric).__name__}; expected a name, or a function of sparse and dense logits.")
    if threshold is None or threshold != threshold:
        raise ValueError(f"threshold was {threshold} with a metric; expected the largest value that will do.")
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
    function = METRICS[metric] if isinstance(metric, str) else metric
    return SmallMetric(model, prompt, function, name, threshold, dense)


def _check_config(config: StreamConfig) -> None:
    if config.forward == "exact":
        raise ValueError(
            "config had forward='exact', with which every budget is the dense model; expected forward='sparse'. Leave it out."
        )
    if config.layout_from is not None:
        raise ValueError(
            f"config had layout_from=a {type(config.layout_from).__name__}, with which every budget runs on the same blocks; "
            "expected None. Leave it out."
        )


def _check_match(match: Any, prompt: Tensor, n_ctx: int) -> None:
    if isinstance(match, bool) or not isinstance(match, int):
        raise TypeError(f"match was {match!r}; expected an int >= 1.")
    if match < 1:
        raise ValueError(f"match was {match}; expected at least 1 token to compare.")
    if prompt.shape[1] + match > n_ctx:
        raise ValueError(
            f"match was {match} after {prompt.shape[1]} tokens, more than the model's n_ctx of {n_ctx}; expected at most "
            f"{max(n_ctx - prompt.shape[1], 0)}."
        )
