"""Counterfactual importance of sentences, by resampling the text from before each (arXiv:2506.19143, section 3).

1. From the prefix that ends before sentence i, and from that which ends after it, n continuations each are sampled.
2. Resampling importance: how far the answers without sentence i are from those with it.
3. Counterfactual importance: the same, of those continuations only whose first sentence, which took the place of sentence i,
   says something else: its similarity to sentence i is below the median of all similarities.

Everything is an estimate from n samples: the sampler, the answers' extraction and the similarity are the caller's.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas
import plotly.graph_objects as go
from tqdm.auto import tqdm

from tl_stream.analysis.segmentation import Sentence, Splitter, paper_split
from tl_stream.audit import records

Sampler = Callable[[str, int], Sequence[str]]
Answers = Counter[str]
Metric = Callable[[Answers, Answers], Any]


def smoothed_kl(without: Answers, having: Answers) -> float:
    """KL(without || with) of the two distributions of answers, in nats, one count added to each answer that either has."""
    answers = without.keys() | having.keys()
    p, q = ({a: (c[a] + 1) / (c.total() + len(answers)) for a in answers} for c in (without, having))
    return sum(p[a] * math.log(p[a] / q[a]) for a in answers)


def total_variation(without: Answers, having: Answers) -> float:
    """Half the sum of the absolute differences of the answers' shares: 0 to 1."""
    answers = without.keys() | having.keys()
    return sum(abs(without[a] / without.total() - having[a] / having.total()) for a in answers) / 2


METRICS: dict[str, Metric] = {"kl": smoothed_kl, "difference": total_variation}


def word_similarity(a: str, b: str) -> float:
    """Cosine similarity of word counts. The paper compares sentence embeddings: pass such a function where there is one."""
    x, y = (Counter(text.lower().split()) for text in (a, b))
    size = math.sqrt(sum(n * n for n in x.values()) * sum(n * n for n in y.values()))
    return sum(n * y[word] for word, n in x.items()) / size if size else 0.0


@dataclass(frozen=True)
class SentenceImportance:
    """One sentence.

    Attributes:
        sentence: Its index.
        tag: Its tag.
        text: What it says.
        resampling: How far the answers without it are from those with it.
        counterfactual: The same, of continuations that replace it by something else; None: there were none.
        different: How many of those there were.
    """

    sentence: int
    tag: str
    text: str
    resampling: float
    counterfactual: float | None
    different: int


@dataclass(frozen=True)
class ResamplingImportance:
    """What resampling found.

    Attributes:
        sentences: By sentence.
        threshold: The median similarity of the replacing sentences to the replaced ones.
        samples: Continuations sampled from each prefix.
        exact_for: What the numbers are.
    """

    sentences: tuple[SentenceImportance, ...]
    threshold: float
    samples: int
    exact_for: str

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a sentence."""
        return records.dataframe(self.sentences)

    def plot(self) -> go.Figure:
        """Both importances along the text."""
        table = self.to_dataframe()
        figure = go.Figure(layout={"title": f"Importance of sentences: {self.exact_for}", "template": "plotly_white"})
        for name in ("resampling", "counterfactual"):
            figure.add_scatter(x=table["sentence"], y=table[name], name=name, mode="lines+markers", hovertext=table["text"])
        return figure.update_layout(xaxis_title="sentence", yaxis_title="importance")


def resampling_importance(
    text: str,
    sentences: Sequence[Sentence],
    sampler: Sampler,
    answer: Callable[[str], str | None],
    *,
    samples: int = 100,
    similarity: Callable[[str, str], Any] = word_similarity,
    metric: str | Metric = "kl",
    split: Splitter = paper_split,
    progress: bool = True,
) -> ResamplingImportance:
    """Importance of sentences for the answer.

    Args:
        text: The text.
        sentences: Its sentences, as `tl_stream.analysis.sentences` gives them.
        sampler: `sampler(prefix, n)` gives n continuations of a prefix, each up to the answer.
        answer: From a whole text (prefix and continuation) to its answer; None: it gives none, and is left out.
        samples: Continuations a prefix; `samples * (len(sentences) + 1)` in all.
        similarity: Of two sentences, larger for more alike. The default compares words.
        metric: `"kl"` (smoothed), `"difference"` (total variation), or a function of the answers without and with.
        split: Finds the first sentence of a continuation.
        progress: Show a progress bar.

    Raises:
        ValueError: No sentences, a sampler that doesn't give `samples` strings, a prefix none of whose samples has an
            answer, an unknown metric, or a metric or similarity that isn't one finite number.
    """
    if not sentences or samples < 1:
        raise ValueError(f"sentences were {len(sentences)} and samples {samples}; expected at least one of each.")
    if isinstance(metric, str) and metric not in METRICS:
        raise ValueError(f"metric was {metric!r}; expected one of {', '.join(map(repr, METRICS))}, or a function.")
    measure = METRICS[metric] if isinstance(metric, str) else metric
    prefixes = [text[: sentences[0].chars[0]].rstrip(), *(text[: each.chars[1]] for each in sentences)]
    drawn = [_draw(sampler, prefix, samples) for prefix in tqdm(prefixes, "resampling", disable=not progress)]
    answers = [[answer(prefix + each) for each in found] for prefix, found in zip(prefixes, drawn, strict=True)]
    likeness = [
        [_scalar("similarity", similarity(sentence.text, _first(continuation, split))) for continuation in found]
        for sentence, found in zip(sentences, drawn, strict=False)
    ]
    threshold = statistics.median(value for row in likeness for value in row)
    results = []
    for i, sentence in enumerate(sentences):
        having, without = (_count(each, i) for each in (answers[i + 1], answers[i]))
        others = Counter(a for a, alike in zip(answers[i], likeness[i], strict=True) if a is not None and alike < threshold)
        results.append(
            SentenceImportance(
                sentence=i,
                tag=sentence.tag,
                text=sentence.text,
                resampling=_scalar("metric", measure(without, having)),
                counterfactual=_scalar("metric", measure(others, having)) if others else None,
                different=others.total(),
            )
        )
    return ResamplingImportance(tuple(results), threshold, samples, f"an estimate from {samples} samples a prefix")


def _draw(sampler: Sampler, prefix: str, samples: int) -> list[str]:
    found = list(sampler(prefix, samples))
    if len(found) != samples or not all(isinstance(each, str) for each in found):
        kinds = sorted({type(each).__name__ for each in found})
        raise ValueError(f"sampler gave {len(found)} of {kinds}; expected a list of {samples} continuations (str).")
    return found


def _first(continuation: str, split: Splitter) -> str:
    """The first sentence."""
    ranges = split(continuation)
    return continuation[slice(*ranges[0])] if ranges else continuation


def _count(answers: Sequence[str | None], sentence: int) -> Answers:
    found = Counter(each for each in answers if each is not None)
    if not found:
        raise ValueError(
            f"answer found none in the {len(answers)} samples around sentence {sentence}; expected some. Sample longer "
            "continuations, or look at what the sampler gives."
        )
    return found


def _scalar(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} gave {value!r}; expected one finite number.")
    return number
