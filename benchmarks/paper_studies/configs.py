"""What is compared: the paper's choice of blocks, and this package's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import tl_stream
from paper_studies.finished import digest
from tl_stream import StreamConfig
from tl_stream.analysis.needle_store import as_json
from tl_stream.budget import Sqrt
from tl_stream.fidelity import BudgetSearch
from tl_stream.fidelity.runs import WHITE_SPACE

MATCH = 2
DENSE_LAYERS = 3  # the paper leaves "the first" dense and this many are our choice
SCALE_STEP = 0.25


@dataclass(frozen=True)
class Candidate:
    """A family of sparse models, of which a search takes the one with the smallest budget that will do.

    Attributes:
        name: Of the rows of a table.
        vary: The config for a budget of 1, 2, ...; larger ones keep more.
        most: The number from which on everything is kept, for so many key blocks.
    """

    name: str
    vary: Callable[[int], StreamConfig]
    most: Callable[[int], int]

    def search(self, model: Any, tokens: Tensor) -> BudgetSearch:
        """The smallest budget with which greedy generation gives the dense model's next two tokens that carry text.

        (The paper's two tokens, without white space: with many tokenizers they would be a space and a digit.)
        """
        config = self.vary(1)
        most = self.most(-(-(tokens.shape[1] + MATCH + WHITE_SPACE) // config.block_k))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* larger ones fail", category=UserWarning)  # the rows say so
            return tl_stream.find_budget(model, tokens, MATCH, config=config, over=self.vary, high=most)

    def about(self, tokens: Tensor) -> dict[str, Any]:
        """What a search depends on, as JSON has it."""
        return {"run": self.name, "smallest": as_json(self.vary(1)), "match": MATCH, "tokens": digest(tokens)}


def paper(block: int) -> Candidate:
    """The paper's: square blocks, nodes scored by means, a constant k, the first layers dense."""

    def vary(k: int) -> StreamConfig:
        return StreamConfig(block_q=block, block_k=block, k=k, estimator="stream", dense_layers=DENSE_LAYERS)

    return Candidate(f"paper, b = {block}", vary, lambda n_blocks: n_blocks)


def ours(block: int, block_k: int | None = None) -> Candidate:
    """The package's default choice of blocks, square ones or others, and a budget by the square root of the position."""
    keys = block if block_k is None else block_k

    def vary(step: int) -> StreamConfig:
        return StreamConfig(block_q=block, block_k=keys, k=Sqrt(SCALE_STEP * step))

    return Candidate(
        f"ours, b = {block}" if keys == block else f"ours, {block} x {keys}",
        vary,
        lambda n_blocks: math.ceil(math.sqrt(n_blocks) / SCALE_STEP),
    )


def budget_of(config: StreamConfig | None) -> str:
    """A budget in words."""
    if config is None:
        return "none will do"
    return f"{config.k.scale:g} sqrt(n)" if isinstance(config.k, Sqrt) else f"{config.k}"
