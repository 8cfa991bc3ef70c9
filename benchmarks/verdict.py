"""The chance that dense attention says otherwise: measured on four models, fitted on one, tested on the others.

    python benchmarks/verdict.py collect --model FOLDER [--seeds 0 20] [--minutes N]
    python benchmarks/verdict.py fit [--html FILE] [--json FILE]

`collect` appends one line a sparse run to `verdict.jsonl` beside this script, which holds those that the coefficients of
`tl_stream.audit.verdict` come from; an interrupted collection goes on. FOLDER is a saved Hugging Face model, or `mini` or
`english` for the two of this repository. What is read:

- prose: held-out English (`english/held_out.txt.gz`); the last 8 next tokens of a window. (Not by `mini`.)
- yes/no: such a window, then whether a word is in it. One next token. (The real models.)
- needle: RULER's needles in essays, in the chat template where there is one; 8 tokens of the dense model's answer. For `mini`
  needles among noise, variables and reasoning traces.

Budgets are so small that a fifth to a third of the next tokens flip: the sparse run's most likely one isn't the dense model's,
after the same text. Each run is audited and rechecked. `fit` then takes the next tokens of `FITTED_ON` for a logistic function
(maximum likelihood), and the other models for all that is said of it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from english.corpus import held_out_text
from paper_studies.loading import load, tokens_of
from plotly.subplots import make_subplots
from rich.console import Console
from sources import ENGLISH_MODEL
from torch import Tensor

import tl_stream
from tl_stream import StreamConfig
from tl_stream.audit import records
from tl_stream.audit.next_tokens import lead
from tl_stream.audit.verdict import ALONE, BY_MASS, DOUBT, RECHECKED, Logistic, settled
from tl_stream.cache import is_pattern
from tl_stream.fidelity.runs import dense_config, greedy_tokens
from tl_stream.models.evaluate import wilson
from tl_stream.tasks import chat_prompt, in_chat, niah, niah_multikey_1, niah_single_2, reasoning_trace, variable_tracking

DATA = Path(__file__).with_suffix(".jsonl")
FITTED_ON = "smollm2"
BUNDLED = {"mini": Path(tl_stream.models.__file__).with_name("mini"), "english": ENGLISH_MODEL}
ANSWER = 8
DENSE_ROWS = 64
FIRST_LONGER, FIRST_LONG = 20, 1000  # seeds: of longer texts, and of 4,096 tokens
OLD_THRESHOLD = 0.43  # of lost mass / the lesser lead in probability, which the audit went by before
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, metavar="FILE")
    jobs = parser.add_subparsers(dest="job", required=True)
    collecting, fitting = jobs.add_parser("collect"), jobs.add_parser("fit")
    collecting.add_argument("--model", required=True, metavar="FOLDER", help="a folder, 'mini' or 'english'")
    collecting.add_argument("--seeds", type=int, nargs=2, default=(0, 20), metavar=("FIRST", "STOP"))
    collecting.add_argument("--minutes", type=float, default=math.inf)
    fitting.add_argument("--html", type=Path, metavar="FILE", help="write the curves there")
    fitting.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    if options.job == "collect":
        collect(options.model, options.data, range(*options.seeds), time.monotonic() + 60 * options.minutes)
    else:
        report(read(options.data), options.html, options.json)


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@torch.no_grad()
def collect(model_name: str, path: Path, seeds: range, stop: float) -> None:
    """Append a line for each text and config that isn't in the file yet, until the time is up."""
    name = Path(model_name).name
    model: Any = tl_stream.models.load(BUNDLED[name]) if name in BUNDLED else load(model_name, "cpu", torch.float32)
    done = {key(row) for row in read(path)}
    for seed in seeds:
        for case, (kind, tokens, n) in enumerate(texts(name, model, seed)):
            known: list[Tensor] = []
            for config in configs(name, seed):
                about = {"model": name, "kind": kind, "seed": seed, "case": case, "tokens": tokens.shape[1]}
                about |= {"estimator": config.estimator, "block": config.block_k, "k": config.k}
                if key(about) in done:
                    continue
                if time.monotonic() > stop:
                    return
                row = about | measured(model, tokens, n, config, known)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "kind", "seed", "case", "estimator"))


def texts(name: str, model: Any, seed: int) -> Iterator[tuple[str, Tensor, int]]:
    """Kind, tokens, and the number of next tokens to look at."""
    rng = random.Random(seed)
    lengths = (384, 384, 640, 1024) if seed < FIRST_LONGER else (640, 1024, 1024) if seed < FIRST_LONG else (4096,)
    length = rng.choice(lengths)
    if name == "mini":
        yield from retrieval(model, max(lengths), rng, seed)
        return
    yield "prose", prose(model, length, rng), ANSWER
    if name not in BUNDLED:
        yield "yes/no", tokens_of(model, asked(model, length - 40, rng)), 1
        make: Any = (niah_single_2, niah_multikey_1)[seed % 2]
        task = (in_chat(make) if model.tokenizer.chat_template else make)(
            model.tokenizer, length, depth=rng.random(), seed=10_000 + seed
        )
        yield "needle", answered(model, tokens_of(model, task.prompt), ANSWER), ANSWER


def retrieval(model: Any, length: int, rng: random.Random, seed: int) -> Iterator[tuple[str, Tensor, int]]:
    """What the bundled model knows."""
    for keys in (1, 4):
        needles = niah(model.tokenizer, length, depth=rng.random(), keys=keys, seed=10_000 + seed)
        yield "needle", answered(model, model.to_tokens(needles.prompt), len(needles.value)), len(needles.value)
    variables = variable_tracking(model.tokenizer, length, seed=10_000 + seed)
    yield "variables", answered(model, model.to_tokens(variables.prompt), 5), 5
    yield (
        "trace",
        model.to_tokens(reasoning_trace(model.tokenizer, min(length * 100 // 1024, 270), seed=10_000 + seed).prompt),
        1,
    )


def passage(length: int, rng: random.Random) -> str:
    """Held-out text from the beginning of a line, of some characters."""
    text = held_out_text()
    start = text.index("\n", rng.randrange(0, len(text) - 8 * length)) + 1
    return text[start : start + 7 * length]


def prose(model: Any, length: int, rng: random.Random) -> Tensor:
    return tokens_of(model, passage(length, rng))[:, :length]


def asked(model: Any, length: int, rng: random.Random) -> str:
    """A passage, and whether it has a word: one of its own or of the text's end."""
    part = passage(length + 40, rng)
    part = part[: model.tokenizer(part, return_offsets_mapping=True)["offset_mapping"][length - 1][1]]
    word = rng.choice(sorted(set(re.findall(r"[a-z]{5,}", part if rng.random() < 0.5 else held_out_text()[-50_000:]))))
    question = f'contain the word "{word}"? Answer with yes or no.'
    if model.tokenizer.chat_template:
        return chat_prompt(model.tokenizer, f"{part}\n\nDoes the text above {question}")
    return f"{part}\n\nQuestion: Does the text above {question}\nAnswer:"


def answered(model: Any, prompt: Tensor, n: int) -> Tensor:
    """A prompt and all but the last of the dense model's next tokens."""
    with tl_stream.sparse(model, dense_config(StreamConfig(block_q=16, block_k=16)), logits_to_keep=1):
        return torch.cat([prompt, greedy_tokens(model, prompt, n)[:, :-1].clone()], 1)


def configs(name: str, seed: int) -> list[StreamConfig]:
    """The default choice of blocks and the paper's, with a small budget."""
    i = random.Random(1000 + seed).randrange(3 if seed < FIRST_LONGER else 2)
    block, dual, stream = (8, (1, 2, 4), (8, 16, 32)) if name == "mini" else (16, (2, 3, 5), (5, 8, 12))
    config = StreamConfig(block_q=block, block_k=block)
    return [replace(config, k=dual[i]), replace(config, k=stream[i], estimator="stream")]


def measured(model: Any, tokens: Tensor, n: int, config: StreamConfig, known: list[Tensor]) -> Row:
    """Of each of the last n next tokens: whether it flipped, and what the audit and rechecks of three kinds know.

    `known` keeps the dense model's next tokens, which are the same for all configs.
    """
    if not known:
        known.append(logits_of(model, tokens, n, dense_config(config)).argmax(-1))
    logits, cache = model.run_with_sparse_cache(tokens, config=config, logits_to_keep=n, names_filter=is_pattern)
    said = logits.argmax(-1)
    same_blocks = replace(config, layout_from=cache)
    rows = logits_of(model, tokens, n, replace(same_blocks, dense_queries=n))
    more_rows = logits_of(model, tokens, n, replace(same_blocks, dense_queries=DENSE_ROWS))
    (rechecked,) = tl_stream.recheck(model, tokens, cache, rows=n, sample=0).answers
    assert rechecked.lead is not None
    assert rechecked.reread is not None
    return {
        "flipped": (said != known[0])[0].tolist(),
        "retained": rounded(rechecked.retained),
        "lead": rounded(rechecked.lead),
        "reread, its rows": rounded(lead(rows, said)[0].tolist()),
        "reread, 64 rows": rounded(lead(more_rows, said)[0].tolist()),
        "reread": rounded(rechecked.reread),
        "old lead": rounded(probability_lead(logits, said)),
        "old reread": rounded(probability_lead(rows, said)),
    }


def logits_of(model: Any, tokens: Tensor, n: int, config: StreamConfig) -> Tensor:
    with tl_stream.sparse(model, config, logits_to_keep=n):
        return model(tokens)


def probability_lead(logits: Tensor, token: Tensor) -> list[float]:
    """By how much a token is more probable than any other."""
    probability, index = logits.float().softmax(-1), token[..., None]
    return (probability.gather(-1, index) - probability.scatter(-1, index, 0).amax(-1, keepdim=True))[0, :, 0].tolist()


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


@dataclass(frozen=True)
class Score:
    """One way to tell flipped next tokens.

    Attributes:
        name: In words.
        features: What is known of the i-th next token of a run.
        in_use: The function that the package uses, if this is one of its three.
    """

    name: str
    features: Callable[[Row, int], list[float]]
    in_use: Logistic | None = None


def log_lost(row: Row, i: int) -> float:
    return math.log(max(1 - row["retained"][i], 1e-6))


def settled_of(row: Row, i: int) -> float:
    return float(settled(torch.tensor(row["lead"][i : i + 1]), torch.tensor(row["reread"][i : i + 1])))


SCORES = (
    Score("lost mass", lambda row, i: [log_lost(row, i)], BY_MASS),
    Score("lead, lost mass", lambda row, i: [row["lead"][i], log_lost(row, i)], ALONE),
    Score("rechecked: the answer's rows", lambda row, i: [row["reread, its rows"][i]]),
    Score("rechecked: 64 rows", lambda row, i: [row["reread, 64 rows"][i]]),
    Score("rechecked: twice the budget, too", lambda row, i: [row["reread"][i]]),
    Score("the same, against what it moved", lambda row, i: [settled_of(row, i)], RECHECKED),
)


def fitted(features: Tensor, flipped: Tensor) -> Logistic:
    """Maximum likelihood by Newton's method, with a ridge of 0.01 for the sake of separable cases."""
    x = torch.cat([torch.ones(len(features), 1, dtype=torch.float64), features], 1)
    weights, ridge = x.new_zeros(x.shape[1]), 0.01
    for _ in range(100):
        chance = (x @ weights).sigmoid()
        slope = x.T @ (chance - flipped.double()) + ridge * weights
        curvature = (x.T * (chance * (1 - chance))) @ x + ridge * torch.eye(len(weights), dtype=torch.float64)
        weights = weights - torch.linalg.solve(curvature, slope).clamp(-3, 3)
    intercept, *slopes = (round(each, 2) for each in weights.tolist())
    return Logistic(intercept, tuple(slopes))


def report(rows: list[Row], html: Path | None, path: Path | None) -> None:
    """All figures, as tables; the curves and the figures as files."""
    parts = {name: [row for row in rows if row["model"] == name] for name in dict.fromkeys(row["model"] for row in rows)}
    parts = {f"{name}{end}": kept for name, part in parts.items() for end, kept in split(part).items() if kept}
    figures: list[Row] = []
    for score in SCORES:
        function = fitted(*known(parts[FITTED_ON], score))
        figures += [figure(name, score, function, part) for name, part in parts.items()]
        if score.in_use is not None and function != score.in_use:
            print(f"{score.name}: {function} by these data; the package has {score.in_use}")
    figures += [old(name, part, again) for again in (False, True) for name, part in parts.items()]
    header = list(figures[0])[:-1]
    Console(width=220).print(records.table("Next tokens", header, [[row.get(name) for name in header] for row in figures]))
    answers = [answer_figure(name, part, function) for name, part in parts.items() for function in (ALONE, RECHECKED)]
    Console(width=220).print(records.table("Answers", list(answers[0]), [list(row.values()) for row in answers]))
    if path:
        path.write_text(json.dumps({"next tokens": figures, "answers": answers}, indent=1))
    if html:
        drawn(parts).write_html(html, include_plotlyjs="cdn")


def split(rows: list[Row]) -> dict[str, list[Row]]:
    """The texts up to 1,024 tokens, and the long ones."""
    long = [row for row in rows if row["seed"] >= FIRST_LONG]
    return {"": [row for row in rows if row["seed"] < FIRST_LONG], ", 4,096 tokens": long}


def known(rows: list[Row], score: Score) -> tuple[Tensor, Tensor]:
    """Features and flips of all next tokens."""
    pairs = [(row, i) for row in rows for i in range(len(row["flipped"]))]
    features = torch.tensor([score.features(*pair) for pair in pairs], dtype=torch.float64)
    return features, torch.tensor([row["flipped"][i] for row, i in pairs])


def figure(name: str, score: Score, function: Logistic, rows: list[Row]) -> Row:
    features, flipped = known(rows, score)
    chance = function(*features.unbind(-1))
    return {"model": name, "score": score.name, **told(chance, flipped, DOUBT), "bins": reliability(chance, flipped)}


def old(name: str, rows: list[Row], again: bool) -> Row:
    """What went before: lost mass / the lesser lead, above a threshold."""
    doubts, flips = [], []
    for row in rows:
        for i, flipped in enumerate(row["flipped"]):
            least, lost = min(row["old lead"][i], row["old reread"][i] if again else math.inf), 1 - row["retained"][i]
            doubts.append(lost / max(least, 1e-9) if lost > 0 else 0.0)
            flips.append(flipped)
    told_of = told(torch.tensor(doubts, dtype=torch.float64), torch.tensor(flips), OLD_THRESHOLD)
    name_of = f"before: lost mass / lead{', rechecked' if again else ''}"
    return {"model": name, "score": name_of, **told_of, "mean chance": None, "Brier": None, "bins": []}


def told(score: Tensor, flipped: Tensor, threshold: float) -> Row:
    doubted = score > threshold
    shares = [(int((doubted & part).sum()), int(part.sum())) for part in (flipped, ~flipped)]
    return {
        "tokens": len(flipped),
        "flipped": shares[0][1],
        "AUC": area(score, flipped),
        "caught": share(*shares[0]),
        "false alarms": share(*shares[1]),
        "mean chance": float(score.mean()),
        "Brier": float(((score - flipped.double()) ** 2).mean()),
    }


def share(number: int, of: int) -> str:
    if not of:
        return "0/0"
    low, high = wilson(number / of, of)
    return f"{number}/{of} [{low:.0%}, {high:.0%}]"


def area(score: Tensor, flipped: Tensor) -> float:
    """Probability that a flipped one has the higher score, ties counting half."""
    high, low = score[flipped][:, None], score[~flipped]
    return float(((high > low).double() + (high == low).double() / 2).mean())


def reliability(chance: Tensor, flipped: Tensor) -> list[Row]:
    """Of next tokens with about the same chance: how many there are, their mean chance, and how many flipped."""
    edges = torch.tensor([0, 0.02, 0.1, 0.3, 0.7, 0.9, 1.01], dtype=torch.float64)
    bins = torch.bucketize(chance, edges, right=True)
    parts = [(chance[bins == i], flipped[bins == i]) for i in range(1, len(edges))]
    return [{"tokens": len(x), "mean chance": float(x.mean()), "flipped": float(y.double().mean())} for x, y in parts if len(x)]


def answer_figure(name: str, rows: list[Row], function: Logistic) -> Row:
    """Answers of one to eight next tokens: the chance that any of them is another one."""
    score = next(each for each in SCORES if each.in_use is function)
    pairs = [known([row], score) for row in rows]
    chance = torch.stack([1 - (1 - function(*features.unbind(-1))).prod() for features, _ in pairs])
    flipped = torch.stack([flips.any() for _, flips in pairs])
    figures = told(chance, flipped, DOUBT)
    return {"model": name, "score": score.name, "answers": figures.pop("tokens"), **figures}


def drawn(parts: dict[str, list[Row]]) -> go.Figure:
    """ROC curves and reliability diagrams of the three functions in use, each model in a colour."""
    scores = [score for score in SCORES if score.in_use is not None]
    made = make_subplots(2, len(scores), subplot_titles=[score.name for score in scores], vertical_spacing=0.12)
    colours = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")
    for column, score in enumerate(scores, 1):
        assert score.in_use is not None
        for colour, (name, part) in zip(colours, parts.items(), strict=False):
            features, flipped = known(part, score)
            chance = score.in_use(*features.unbind(-1))
            label = f"{name} (fitted on)" if name == FITTED_ON else name
            options = {"name": label, "line_color": colour, "legendgroup": name, "showlegend": column == 1}
            order = chance.argsort(descending=True)
            false, hit = ((part[order].cumsum(0) / part.sum()).tolist() for part in (~flipped, flipped))
            text = [f"chance {value:.3f}" for value in chance[order].tolist()]
            made.add_scatter(x=false, y=hit, text=text, mode="lines", **options, row=1, col=column)
            bins = reliability(chance, flipped)
            options["showlegend"] = False
            made.add_scatter(
                x=[each["mean chance"] for each in bins], y=[each["flipped"] for each in bins],
                text=[f"{each['tokens']} next tokens" for each in bins], mode="lines+markers", **options, row=2, col=column,
            )  # fmt: skip
        made.add_scatter(x=[0, 1], y=[0, 1], line={"dash": "dot", "color": "gray"}, showlegend=False, row=2, col=column)
    made.update_xaxes(title="share of unflipped next tokens doubted", row=1).update_yaxes(title="share of flipped ones", row=1)
    made.update_xaxes(title="chance stated", row=2).update_yaxes(title="share flipped", row=2)
    return made.update_layout(title="The chance that dense attention says otherwise", template="plotly_white", height=850)


if __name__ == "__main__":
    main()
