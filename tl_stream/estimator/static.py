"""Baselines that don't look at the keys: the most recent blocks with the first one, and random blocks."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from tl_stream.estimator.candidates import Candidates
from tl_stream.estimator.problem import Problem

_BITS = 24  # of a random number, all that float32 holds


def window_masses(problem: Problem, k: int) -> Candidates:
    """The first block and the `k - 1` most recent ones (StreamingLLM, arXiv:2309.17453), as candidates.

    Their masses give the order in which a smaller budget takes them: the own block, the first one, then the most recent.
    """
    recent = problem.diagonal - torch.arange(k, device=problem.keys.device)
    recent = recent.expand(*problem.shape, -1)
    sink = problem.sink.expand(*problem.shape, 1)
    blocks = torch.cat([recent[..., :1], sink, recent[..., 1:]], -1)
    used = (blocks >= 0) & ((blocks + 1) * problem.block_k > problem.first_key[:, None])
    used = used & torch.cat([torch.ones_like(sink, dtype=torch.bool), sink != recent[..., :1], recent[..., 1:] != sink], -1)
    masses = 1 / torch.arange(1, k + 2, device=blocks.device)
    return blocks.clamp(min=0), masses.expand(blocks.shape).masked_fill(~used, -1.0)


def random_masses(problem: Problem, seed: int) -> Candidates:
    """Every block that the mask leaves, with a random mass: by seed, head, place of the query block and key block."""
    blocks, used = problem.readable_blocks()
    mixed = torch.full_like(blocks, seed % 2**63)
    for part in (problem.head_index, problem.first_own[:, None], blocks):
        mixed = _mixed(mixed + part)
    masses = (mixed & ((1 << _BITS) - 1)) / (1 << _BITS)
    return blocks, masses.masked_fill(~used, -1.0)


def _mixed(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """64 bits, each of which depends on all those of `x` (SplitMix64: Steele et al. 2014, figure 17)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(bits: int) -> int:
    return bits - (1 << 64)  # as int64, for constants whose first bit is set


def _shifted(x: Tensor, n: int) -> Tensor:
    """Shifted to the right by `n` bits, zeros coming in."""
    return (x >> n) & ((1 << (64 - n)) - 1)
