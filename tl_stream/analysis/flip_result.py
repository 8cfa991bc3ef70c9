"""What a search for flips found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas
import plotly.graph_objects as go
from rich.table import Table

from tl_stream.audit import records
from tl_stream.audit.verdict import DOUBT
from tl_stream.config import StreamConfig

RUNS = ("vanilla", "sparse", "k1", "k_adv", "k2")


@dataclass(frozen=True)
class FlipRun:
    """One run of one prompt.

    Attributes:
        k: Kept key blocks a query block; None: nothing is pruned.
        same: Whether it gives the answer that the dense model gives without inserted tokens.
        pruned: Share of the token pairs dropped, over all layers and heads.
        retained: Retained mass of the answer's row that keeps least, mean over layers and heads: exact for the run's own
            queries and keys.
        chance: The chance that dense attention says otherwise in the answer's rows, by the audit of this run alone.
        chance_rechecked: The same by `tl_stream.recheck`, which takes one more sparse run.
        trusted: Whether the audit of this run alone trusts the answer's rows.
        rechecked: Whether the recheck does.
    """

    k: int | None
    same: bool
    pruned: float
    retained: float
    chance: float
    chance_rechecked: float
    trusted: bool
    rechecked: bool


@dataclass(frozen=True)
class Flip:
    """One prompt.

    Attributes:
        prompt: Its index.
        answer: What the dense model says next, without inserted tokens.
        inserted: The tokens after which the sparse model says something else while the dense one doesn't; or, where none were
            found, those that came nearest. Empty: the sparse model says something else without any.
        tried: How many insertions were tried.
        sparse: The sparse model, without tokens.
        vanilla: The dense model, with the tokens; None, as all below: none were tried.
        k1: The sparse model, with them, at half the budget; None: there is no smaller one.
        k_adv: The sparse model, with them, at the budget that was attacked.
        k2: The same at the first larger budget (doubling) that gives the answer again; None: only the full one does.
    """

    prompt: int
    answer: tuple[int, ...]
    inserted: tuple[int, ...]
    tried: int
    sparse: FlipRun
    vanilla: FlipRun | None = None
    k1: FlipRun | None = None
    k_adv: FlipRun | None = None
    k2: FlipRun | None = None

    @property
    def found(self) -> bool:
        """Whether the inserted tokens alone make the sparse model answer differently, and leave the dense one's answer."""
        if self.vanilla is None or self.k_adv is None:
            return False
        return self.sparse.same and self.vanilla.same and not self.k_adv.same

    @property
    def is_artefact(self) -> bool:
        """Whether a flip comes and goes with the budget: still there below it, gone at a larger one that prunes."""
        return self.found and (self.k1 is None or not self.k1.same) and self.k2 is not None

    @property
    def runs(self) -> dict[str, FlipRun]:
        """The runs there are, by name."""
        return {name: run for name in RUNS if (run := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Flips:
    """What `find_flips` found.

    Attributes:
        prompts: One entry for each.
        config: The config that was attacked.
        method: How tokens were searched for.
        exact_for: What the numbers are exact for.
    """

    prompts: tuple[Flip, ...]
    config: StreamConfig
    method: str
    exact_for: str = "answers: the dense and the sparse model; retained mass: each sparse run's own queries and keys"

    @property
    def sparse_runs(self) -> Iterator[FlipRun]:
        """All runs that pruned: what an audit can be judged by."""
        return (run for flip in self.prompts for run in flip.runs.values() if run.k is not None)

    def flagged(self, recheck: bool = True) -> float | None:
        """Share of the sparse runs with another answer that the audit, which sees no dense one, doubts; None: no such run."""
        return self._doubted(False, recheck)

    def false_alarms(self, recheck: bool = True) -> float | None:
        """Share of the sparse runs with the dense answer that it doubts, too; None: no such run."""
        return self._doubted(True, recheck)

    def same(self, run: str) -> float | None:
        """Share of the prompts with the dense answer in a run (one of `RUNS`); None: no such run."""
        return _share([found.same for flip in self.prompts if (found := flip.runs.get(run)) is not None])

    def table(self) -> Table:
        """Of each prompt, whether each run gives the dense answer, and at which budget."""
        cells = [
            [flip.prompt, flip.tried, *(_said(flip.runs.get(name)) for name in RUNS), _verdict(flip)] for flip in self.prompts
        ]
        shares = [self.same(name) for name in RUNS]
        if cells:
            cells.append(["all", "", *("-" if share is None else f"{share:.0%}" for share in shares), self._found()])
        caption = f"Runs that give the dense model's answer (budget, the audit's verdict). {self._audited()}"
        return records.table(f"Flips by {self.method}", ("prompt", "tried", *RUNS, "verdict"), cells, caption)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a prompt and run."""
        rows = [
            {"prompt": flip.prompt, "run": name, "found": flip.found, "is_artefact": flip.is_artefact, **records.record(run)}
            for flip in self.prompts
            for name, run in flip.runs.items()
        ]
        return pandas.DataFrame(rows)

    def plot(self) -> go.Figure:
        """The chance of another answer that the audit gives every sparse run; rechecked, it doubts those above the line."""
        made = go.Figure()
        for name, same in (("the dense answer", True), ("another answer", False)):
            runs = [run for run in self.sparse_runs if run.same == same]
            alone, again = [run.chance for run in runs], [run.chance_rechecked for run in runs]
            made.add_scatter(x=alone, y=again, text=[f"k = {run.k}" for run in runs], name=name, mode="markers")
        made.add_scatter(x=[0, 1], y=[DOUBT, DOUBT], name="doubted above", mode="lines")
        return made.update_layout(
            title=f"Flips by {self.method}: {self._found()}",
            xaxis_title="chance that dense attention says otherwise, from the run alone",
            yaxis_title="the same, rechecked",
            template="plotly_white",
        )

    def _found(self) -> str:
        artefacts = sum(flip.is_artefact for flip in self.prompts)
        flipped, alone = sum(flip.found for flip in self.prompts), sum(not flip.sparse.same for flip in self.prompts)
        said = f"tokens flipped {flipped} of {len(self.prompts)} prompts ({artefacts} by sparsity alone)"
        return f"{said}; {alone} flip without tokens"

    def _doubted(self, same: bool, recheck: bool) -> float | None:
        return _share([not (run.rechecked if recheck else run.trusted) for run in self.sparse_runs if run.same == same])

    def _audited(self) -> str:
        found = [share(recheck) for recheck in (True, False) for share in (self.flagged, self.false_alarms)]
        flagged, alarms, alone, alarms_alone = ("-" if share is None else f"{share:.0%}" for share in found)
        return (
            f"The audit, rechecked, doubts {flagged} of the runs with another answer and {alarms} of those with the dense one; "
            f"of the run alone, {alone} and {alarms_alone}."
        )

    def __repr__(self) -> str:
        return f"Flips({self._found()}. {self._audited()})"


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def _said(run: FlipRun | None) -> str:
    if run is None:
        return "-"
    budget = "all" if run.k is None else f"k = {run.k}"
    return f"{'same' if run.same else 'other'} ({budget}, {'trusted' if run.rechecked else 'doubted'})"


def _verdict(flip: Flip) -> str:
    if not flip.sparse.same:
        return "flips without tokens"
    if not flip.found:
        return "not flipped"
    return "flipped by sparsity alone" if flip.is_artefact else "flipped"
