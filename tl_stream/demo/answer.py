"""Greedy generation of the answer, with a note of how every head's answering row reads the needle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.cache import is_pattern
from tl_stream.demo.result import HeadReading
from tl_stream.hosts.kv_cache import served
from tl_stream.hosts.uninterrupted import Uninterrupted
from tl_stream.tasks import NeedleTask
from tl_stream.tensors import BlockSparsePattern
from tl_stream.tensors.joined import JoinedTensor

READS = 0.1  # a head reads the needle where some answer row puts this much of its probability there


@dataclass(frozen=True)
class Answer:
    """A generated answer, and what its rows of attention did.

    Attributes:
        text: The answer.
        needle: Mass on the needle, by answer token, layer and head.
        retained: Share of the full softmax that lies on kept keys; 1 in a dense run.
    """

    text: str
    needle: Float[Tensor, "step layer head_index"]
    retained: Float[Tensor, "step layer head_index"]


def generate(model: Any, prompt: Int[Tensor, "batch pos"], task: NeedleTask) -> Answer:
    """As many tokens as the answer has, with whatever attention the model has at the moment."""
    needle: list[Tensor] = []
    retained: list[Tensor] = []

    def note(pattern: Tensor, hook: Any) -> None:
        row = pattern[0, :, -1:]
        needle.append(row[:, 0, task.needle.slice].sum(-1))
        retained.append(
            row.retained_mass()[:, 0] if isinstance(row, BlockSparsePattern | JoinedTensor) else row.new_ones(len(row))
        )

    with served(model), Uninterrupted(model.hooks(fwd_hooks=[(is_pattern, note)])):
        output = model.generate(prompt, max_new_tokens=len(task.value), do_sample=False, verbose=False)
    text = model.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    by_step = (-1, model.cfg.n_layers, model.cfg.n_heads)
    return Answer(text, torch.stack(needle).view(by_step), torch.stack(retained).view(by_step))


def readings(sparse: Answer, dense: Answer) -> tuple[HeadReading, ...]:
    """The heads that read the needle at some token in either model, the strongest first; the strongest if none does."""
    most = torch.maximum(sparse.needle.amax(0), dense.needle.amax(0))
    ranked = most.flatten().argsort(descending=True, stable=True)[: max(1, int((most >= READS).sum()))]
    return tuple(_reading(sparse, dense, *divmod(rank, most.shape[1])) for rank in ranked.tolist())


def _reading(sparse: Answer, dense: Answer, layer: int, head: int) -> HeadReading:
    by_step = [tuple(x[:, layer, head].tolist()) for x in (sparse.needle, dense.needle, sparse.retained)]
    return HeadReading(layer, head, *by_step)
