"""When a sparse model counts as faithful to the dense one on a text: it generates the same tokens, or a metric is small."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.config import StreamConfig
from tl_stream.fidelity.budget_result import Evaluation, Tokens
from tl_stream.fidelity.pairs import PromptPairs
from tl_stream.fidelity.runs import greedy_answers, greedy_tokens
from tl_stream.tracing import sparse

Logits = Float[Tensor, "batch pos d_vocab"]
Metric = Callable[[Logits, Logits], Any]


def kl(sparse_logits: Logits, dense_logits: Logits) -> float:
    """KL divergence of the sparse model's next-token distribution from the dense model's, in nats: the worst text's."""
    p, q = (logits.double().log_softmax(-1) for logits in (dense_logits, sparse_logits))
    return (p.exp() * (p - q)).sum(-1).max().item()


def logit_difference(sparse_logits: Logits, dense_logits: Logits) -> float:
    """Change of the logit difference between the dense model's two best next tokens: the worst text's."""
    best = dense_logits.topk(2, -1).indices
    dense, found = (-logits.gather(-1, best).diff(dim=-1) for logits in (dense_logits, sparse_logits))
    return (found - dense).abs().max().item()


SHOWN = 3  # texts whose answers a description quotes

METRICS: dict[str, Metric] = {"kl": kl, "logit_difference": logit_difference}


class Criterion(Protocol):
    """What a budget has to meet. The dense model's part is computed once."""

    @property
    def description(self) -> str:
        """What has to be met, in words."""

    @property
    def dense_tokens(self) -> Tokens | None:
        """What the dense model generates, where that is compared."""

    def evaluate(self, budget: int, config: StreamConfig) -> Evaluation:
        """Run the sparse model once."""


class SameTokens:
    """The next tokens of greedy generation are the dense model's (Rosser et al. 2025, arXiv:2510.19875, section 3).

    The paper compares the next two tokens, which with many tokenizers are a space and a digit. Compared here are as many as
    the dense model needs for `n` that carry text (`greedy_answers`).
    """

    def __init__(self, model: Any, prompt: Int[Tensor, "batch pos"], n: int, dense: StreamConfig) -> None:
        self.model, self.prompt = model, prompt
        with sparse(model, dense, logits_to_keep=1):
            answers = greedy_answers(model, prompt, n, model.cfg.n_ctx - prompt.shape[1])
        self.dense_tokens: Tokens | None = answers
        self.description = _described(model.tokenizer, answers)

    def evaluate(self, budget: int, config: StreamConfig) -> Evaluation:
        """Generate with one budget."""
        assert self.dense_tokens is not None
        pairs, steps = PromptPairs(), max(map(len, self.dense_tokens))
        with sparse(self.model, config, logits_to_keep=1), pairs.counted(self.model):
            rows = greedy_tokens(self.model, self.prompt, steps).tolist()
        tokens = tuple(tuple(row[: len(dense)]) for row, dense in zip(rows, self.dense_tokens, strict=True))
        return Evaluation(budget, pairs.pruned, pairs.pruned_causal, tokens == self.dense_tokens, tokens=tokens)


def _described(tokenizer: Any, answers: Tokens) -> str:
    numbers = sorted(set(map(len, answers)))
    number = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    tokens = "token is" if numbers == [1] else f"{number} tokens are"
    said = "" if tokenizer is None else f": {', '.join(repr(tokenizer.decode(answer)) for answer in answers[:SHOWN])}"
    return f"the next {tokens} the dense model's{said}{', ...' if said and len(answers) > SHOWN else ''}"


class SmallMetric:
    """A metric of the last logits is at most a threshold."""

    dense_tokens: Tokens | None = None

    def __init__(
        self, model: Any, prompt: Int[Tensor, "batch pos"], metric: Metric, name: str, threshold: float, dense: StreamConfig
    ) -> None:
        self.model, self.prompt, self.metric, self.name, self.threshold = model, prompt, metric, name, threshold
        self.description = f"{name} <= {threshold:g}"
        self.dense, _ = self._logits(dense)

    def evaluate(self, budget: int, config: StreamConfig) -> Evaluation:
        """Compute the metric for one budget.

        Raises:
            ValueError: The metric gave NaN.
        """
        logits, pairs = self._logits(config)
        value = float(self.metric(logits, self.dense))
        if math.isnan(value):
            raise ValueError(
                f"metric {self.name} gave NaN at a budget of {budget}; expected a number. Look for NaN or inf in the logits."
            )
        return Evaluation(budget, pairs.pruned, pairs.pruned_causal, value <= self.threshold, value=value)

    def _logits(self, config: StreamConfig) -> tuple[Logits, PromptPairs]:
        pairs = PromptPairs()
        with sparse(self.model, config, logits_to_keep=1), pairs.counted(self.model):
            return self.model(self.prompt), pairs
