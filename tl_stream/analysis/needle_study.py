"""Does the sparse model still find needles? Accuracy over lengths, depths and budgets, beside the dense model's.

For each text of each cell:

1. The dense model generates the answer, its attention streamed.                      O(T^2) time, O(T) memory
2. So does the sparse model, once for each budget.                                    O(T log T) time for constant budgets
3. Both answers are scored as in RULER (arXiv:2404.06654). Of the dense model's attention to the needle, in the rows that
   decide the answer's tokens, what lies on blocks that the sparse run kept is its retained mass.   O(T) a step
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm.auto import tqdm

from tl_stream.analysis.checks import check_count
from tl_stream.analysis.needle_result import NeedleCell, NeedleGrid
from tl_stream.analysis.needle_run import answer_tokens, run_task
from tl_stream.analysis.needle_store import CellStore, Rule, as_json
from tl_stream.budget import Budget, Constant, as_budget
from tl_stream.config import StreamConfig, as_config
from tl_stream.fidelity.runs import dense_config
from tl_stream.tasks import Task, niah_single_1

MakeTask = Callable[..., Task]
_SAMPLED_WEIGHTS = 64


def needle_grid(
    model: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    budgets: Sequence[int | Budget] | Mapping[str, int | Budget | StreamConfig],
    *,
    task: MakeTask = niah_single_1,
    samples: int = 1,
    seed: int = 0,
    config: StreamConfig | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> NeedleGrid:
    """How often needles are found, by depth and length, by the dense model and by the sparse one with each budget.

    Args:
        model: A causal HookedTransformer or TransformerBridge with a tokenizer.
        lengths: Tokens of the prompts; with the answer at most n_ctx.
        depths: Depths of the needle, 0 to 1.
        budgets: What to keep: numbers of key blocks or `tl_stream.budget`s; a dict names them, and may also hold configs that
            differ in more than that.
        task: Makes a text: `task(tokenizer, length, depth=depth, seed=seed)`, as those of `tl_stream.tasks` that have needles.
        samples: Texts a cell, with the seeds `seed`, `seed + 1`, ...; the same ones at every depth and for every budget.
        seed: The first text's seed.
        config: Everything but k; None: the defaults.
        path: A file of JSON lines. Finished cells are written to it, and read instead of computed when it is there already:
            an interrupted study goes on, a finished one grows by lengths, depths or budgets.
        progress: Show a progress bar.

    Raises:
        TypeError: An argument of the wrong type, a task without depth or needles.
        ValueError: No lengths, depths or budgets, or the same one twice; a depth outside 0..1; a length that is too short for
            the task or too long for the model; a needle that is not in the prompt; `forward="exact"`, which prunes nothing;
            or a file of other settings. All of that is known before anything is computed, for the first text of every length.
    """
    config = _checked(config)
    rules = _named(budgets)
    lengths, depths = _axis("lengths", lengths, int), _axis("depths", depths, float)
    if any(not 0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths were {list(depths)}; expected numbers from 0 (before all else) to 1 (after).")
    check_count("samples", samples)
    _check_task(task)
    for length in lengths:
        _make(model, task, length, depths[0], seed)
    study = _Study(model, task, rules, samples, seed, config, CellStore(path, _settings(model, samples, seed, config)))
    places = [(length, depth) for length in lengths for depth in depths]
    with tqdm(desc="needle_grid", total=len(places) * samples, disable=not progress, unit="text") as bar:
        cells = [cell for length, depth in places for cell in study.cells(length, depth, bar)]
    name = getattr(task, "__name__", type(task).__name__)
    return NeedleGrid(name, lengths, depths, rules, samples, config, tuple(cells))


class _Study:
    """Computes the cells that the store lacks."""

    def __init__(
        self,
        model: Any,
        task: MakeTask,
        rules: dict[str, Rule],
        samples: int,
        seed: int,
        config: StreamConfig,
        store: CellStore,
    ) -> None:
        self.model, self.task, self.rules = model, task, rules
        self.seeds, self.config, self.store = range(seed, seed + samples), config, store

    def cells(self, length: int, depth: float, bar: Any) -> list[NeedleCell]:
        """The cells of one length and depth, one for each budget."""
        tasks = [_make(self.model, self.task, length, depth, seed) for seed in self.seeds]
        found = {name: self.store.find(length, depth, name, rule, tasks) for name, rule in self.rules.items()}
        missing = {name: self.rules[name] for name, cell in found.items() if cell is None}
        done: dict[str, NeedleCell] = {name: cell for name, cell in found.items() if cell is not None}
        if missing:
            done |= self._computed(length, depth, tasks, missing, bar)
        else:
            bar.update(len(tasks))
        for name, rule in missing.items():
            self.store.add(done[name], rule, tasks)
        return [done[name] for name in self.rules]

    def _computed(
        self, length: int, depth: float, tasks: list[Task], rules: dict[str, Rule], bar: Any
    ) -> dict[str, NeedleCell]:
        rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in rules}
        for task in tasks:
            bar.set_postfix(length=length, depth=depth)
            dense = run_task(self.model, task, dense_config(self.config))
            for name, rule in rules.items():
                config = rule if isinstance(rule, StreamConfig) else replace(self.config, k=rule)
                run = run_task(self.model, task, config)
                scores = task.score(dense.output), task.score(run.output)
                rows[name].append((*scores, run.pruned, run.pruned_causal, run.retained(dense)))
            bar.update()
        means = {name: [fmean(column) for column in zip(*each, strict=True)] for name, each in rows.items()}
        return {name: NeedleCell(length, depth, name, len(tasks), *values) for name, values in means.items()}


def _make(model: Any, make: MakeTask, length: int, depth: float, seed: int) -> Task:
    task = make(model.tokenizer, length, depth=depth, seed=seed)
    if not isinstance(task, Task) or not task.needles:
        raise TypeError(f"task gave a {type(task).__name__} without needles; expected a tl_stream.tasks.Task that has some.")
    tokens = len(model.tokenizer(task.prompt)["input_ids"])
    if any(span.stop > tokens for span in task.needles):
        stop = max(span.stop for span in task.needles)
        raise ValueError(f"task gave a needle that ends at {stop}, but a prompt of {tokens} tokens; expected it in the prompt.")
    whole = tokens + answer_tokens(model.tokenizer, task)
    if whole > model.cfg.n_ctx:
        raise ValueError(
            f"lengths had {length}; with the answer that is {whole} tokens, more than the {model.cfg.n_ctx} that the model "
            "reads. The needle or the question would be cut off; ask for shorter texts, or load the model with a larger n_ctx."
        )
    return task


def _check_task(task: Any) -> None:
    parameters = inspect.signature(task).parameters if callable(task) else {}
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if not takes_any and not {"depth", "seed"} <= parameters.keys():
        name = getattr(task, "__name__", repr(task))
        raise TypeError(
            f"task was {name}; expected a function (tokenizer, length, *, depth, seed), such as tasks.niah_single_1."
        )


def _checked(config: Any, name: str = "config") -> StreamConfig:
    config = as_config(config, name)
    if config.forward == "exact":
        raise ValueError(f"{name} has forward='exact', in which nothing is pruned; expected forward='sparse'.")
    return config


def _named(budgets: Any) -> dict[str, Rule]:
    """The budgets with names."""
    if isinstance(budgets, Mapping):
        rules = {str(name): _rule(value, f"budgets[{name!r}]") for name, value in budgets.items()}
    elif isinstance(budgets, Sequence) and not isinstance(budgets, str):
        given = [as_budget(value, "budgets") for value in budgets]
        rules = {f"k = {each.k}" if isinstance(each, Constant) else repr(each): each for each in given}
    else:
        raise TypeError(f"budgets was {budgets!r}; expected a list of numbers of blocks or budgets, or a dict of named ones.")
    if len(rules) != len(budgets) or not rules:
        raise ValueError(f"budgets were {budgets}; expected at least one, each of them once.")
    return rules


def _rule(value: Any, name: str) -> Rule:
    return _checked(value, name) if isinstance(value, StreamConfig) else as_budget(value, name)


def _axis(name: str, values: Any, kind: type) -> tuple[Any, ...]:
    """Values in ascending order."""
    allowed = (int, float) if kind is float else (int,)
    if not isinstance(values, Sequence | range) or any(isinstance(v, bool) or not isinstance(v, allowed) for v in values):
        raise TypeError(f"{name} was {values!r}; expected a list of numbers ({kind.__name__}).")
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{name} were {list(values)}; expected at least one, each of them once.")
    return tuple(sorted(kind(value) for value in values))


def _settings(model: Any, samples: int, seed: int, config: StreamConfig) -> dict[str, Any]:
    """What all cells depend on."""
    plain = {name: value for name, value in as_json(config).items() if name != "k"}
    return {"model": weights_digest(model), "samples": samples, "seed": seed, "config": plain}


def weights_digest(model: Any) -> str:
    """Tells models apart, by some of each parameter's weights."""
    weights = hashlib.sha256()
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLED_WEIGHTS)]
        weights.update(some.to("cpu", torch.float32).numpy().tobytes())
    return weights.hexdigest()[:16]
