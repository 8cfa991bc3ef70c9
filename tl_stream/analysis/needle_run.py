"""A greedy answer to a needle task, and what became of the needles in the rows of attention that decided it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_stream.cache import is_pattern
from tl_stream.config import StreamConfig
from tl_stream.fidelity.pairs import PromptPairs
from tl_stream.fidelity.runs import greedy_tokens
from tl_stream.hosts.uninterrupted import Uninterrupted
from tl_stream.layout import BlockLayout
from tl_stream.tasks import Task
from tl_stream.tensors.joined_layout import JoinedLayout
from tl_stream.tracing import sparse


@dataclass(frozen=True, eq=False)
class NeedleRun:
    """What a model generates after a task's prompt. The row of a step is the last one it reads, which decides its token.

    Attributes:
        output: The generated text, as many tokens as the task's answer has.
        attention: Probability on each token of the needles, in the row of each step.
        kept: Whether that token lay in a kept block.
        pruned: Share of the prompt's token pairs that were dropped, over all layers and heads.
    """

    output: str
    attention: Float[Tensor, "layer step head_index needle_pos"]
    kept: Bool[Tensor, "layer step head_index needle_pos"]
    pruned: float

    def retained(self, dense: NeedleRun) -> float:
        """Share of the dense model's attention to the needles, over all rows, layers and heads, that is kept here.

        Where the two generate different tokens, later rows of the same step are compared all the same. 1 where the dense model
        attends to no needle.
        """
        total = dense.attention.sum()
        return (dense.attention.masked_fill(~self.kept, 0.0).sum() / total).item() if total > 0 else 1.0


def answer_tokens(tokenizer: Any, task: Task) -> int:
    """How many tokens the task's answer takes."""
    return len(tokenizer(f"{task.prompt} {task.answer}")["input_ids"]) - len(tokenizer(task.prompt)["input_ids"])


@torch.no_grad()
def run_task(model: Any, task: Task, config: StreamConfig) -> NeedleRun:
    """Generate as many tokens as the answer has. O(T) memory; with constant budgets O(T log T) time."""
    prompt = torch.tensor([model.tokenizer(task.prompt)["input_ids"]], device=next(model.parameters()).device)
    positions = torch.cat([torch.arange(span.start, span.stop) for span in task.needles]).to(prompt.device)
    notes, pairs = _Notes(positions, prompt.shape[1]), PromptPairs()
    steps = answer_tokens(model.tokenizer, task)
    hooks = Uninterrupted(model.hooks(fwd_hooks=[(is_pattern, notes.take)]))
    with sparse(model, config, logits_to_keep=1), pairs.counted(model), hooks:
        tokens = greedy_tokens(model, prompt, steps)
    text = model.tokenizer.decode(tokens[0], skip_special_tokens=True)
    attention, kept = (torch.stack([torch.stack(rows) for rows in x.values()]) for x in (notes.attention, notes.kept))
    return NeedleRun(text, attention, kept, pairs.pruned)


class _Notes:
    """Collects, as hooks fire, the needles' part of every last row."""

    def __init__(self, positions: Int[Tensor, " needle_pos"], prompt_length: int) -> None:
        self.positions, self.prompt_length = positions, prompt_length
        self.attention: dict[str, list[Tensor]] = {}
        self.kept: dict[str, list[Tensor]] = {}

    def take(self, pattern: Any, hook: Any) -> None:
        layout = pattern.block_layout
        rows = self.attention.setdefault(hook.name, [])
        forgotten = self.prompt_length + len(rows) - layout.seq_lengths[1]  # a KV cache drops keys before a sliding window
        there = self.positions >= forgotten
        keys = self.positions[there] - forgotten
        attention = torch.zeros(pattern.shape[1], len(there), device=there.device)
        attention[:, there] = pattern[0, :, -1][:, keys].float()
        kept = torch.zeros_like(attention, dtype=torch.bool)
        kept[:, there] = kept_in_last_row(layout, keys)
        rows.append(attention)
        self.kept.setdefault(hook.name, []).append(kept)


def kept_in_last_row(layout: BlockLayout | JoinedLayout, positions: Int[Tensor, " key"]) -> Bool[Tensor, "head_index key"]:
    """Whether the last query block of the first text keeps the blocks of these keys."""
    if isinstance(layout, JoinedLayout):
        layout = layout.parts[-1]
    indices, used = layout.rows(layout.n_q_blocks - 1)
    same = indices[0, :, 0, :, None] == positions // layout.block_k
    return (same & used[0, :, 0, :, None]).any(1)
