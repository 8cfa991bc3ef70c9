"""A greedy answer to a needle task, and what became of the needles in the rows of attention that decided it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
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
        output: The generated text, up to where its answer is complete (`Task.given`).
        attention: Probability on each token of the needles, in the rows that decide the answer's tokens; in those of all steps
            where no answer is given.
        kept: Whether that token lay in a kept block.
        pruned: Share of the prompt's token pairs that were dropped, over all layers and heads; of a layer with a sliding
            window, of its pairs.
        pruned_causal: The same of all causal pairs.
    """

    output: str
    attention: Float[Tensor, "layer step head_index needle_pos"]
    kept: Bool[Tensor, "layer step head_index needle_pos"]
    pruned: float
    pruned_causal: float

    def retained(self, dense: NeedleRun) -> float:
        """Share of the dense model's attention to the needles, over all rows, layers and heads, that is kept here.

        The row of the one's first answer token is compared with that of the other's, and so on, as far as both go. 1 where
        the dense model attends to no needle.
        """
        steps = min(self.kept.shape[1], dense.attention.shape[1])
        attention = dense.attention[:, :steps]
        total = attention.sum()
        return (attention.masked_fill(~self.kept[:, :steps], 0.0).sum() / total).item() if total > 0 else 1.0


def answer_tokens(tokenizer: Any, task: Task) -> int:
    """How many tokens the task's answer takes."""
    return len(tokenizer(f"{task.prompt} {task.answer}")["input_ids"]) - len(tokenizer(task.prompt)["input_ids"])


@torch.no_grad()
def run_task(model: Any, task: Task, config: StreamConfig) -> NeedleRun:
    """Generate an answer: as many tokens as the right one has, and where that holds no whole answer, from the start with room
    for the question before it. O(T) memory; with constant budgets O(T log T) time."""
    prompt = torch.tensor([model.tokenizer(task.prompt)["input_ids"]], device=next(model.parameters()).device)
    positions = torch.cat([torch.arange(span.start, span.stop) for span in task.needles]).to(prompt.device)
    direct = answer_tokens(model.tokenizer, task)
    roomy = min(direct + len(task.question), model.cfg.n_ctx - prompt.shape[1])
    for n_steps in (direct, roomy):
        notes, pairs = _Notes(positions, prompt.shape[1]), PromptPairs()
        hooks = Uninterrupted(model.hooks(fwd_hooks=[(is_pattern, notes.take)]))
        with sparse(model, config, logits_to_keep=1), pairs.counted(model), hooks:
            tokens = greedy_tokens(model, prompt, n_steps)[0].tolist()
        output, steps = _answered(model.tokenizer, task, tokens)
        if len(task.given(output)) == len(task.references):
            break
    attention, kept = (
        torch.stack([torch.stack([rows[step] for step in steps]) for rows in x.values()]) for x in (notes.attention, notes.kept)
    )
    return NeedleRun(output, attention, kept, pairs.pruned, pairs.pruned_causal)


def _answered(tokenizer: Any, task: Task, tokens: list[int]) -> tuple[str, list[int]]:
    """The generated text up to its answer's end, and the steps that decide the answer; the whole and all, where there is none.

    What comes after an EOS is no part of it.
    """
    eos = tokenizer.eos_token_id
    tokens = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
    texts = [tokenizer.decode(tokens[:n], skip_special_tokens=True) for n in range(len(tokens) + 1)]
    places = task.given(texts[-1])
    if not places:
        return texts[-1], list(range(len(tokens)))
    written = [range(len(before), len(after)) for before, after in pairwise(texts)]
    steps = [i for i, new in enumerate(written) if any(new.start < place.stop and place.start < new.stop for place in places)]
    return (texts[steps[-1] + 1] if len(places) == len(task.references) else texts[-1]), steps


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
