"""Baselines that don't look at the keys: the most recent blocks with the first one, and random blocks."""

from __future__ import annotations

import torch

from tl_stream.estimator.candidates import Candidates
from tl_stream.estimator.problem import Problem


def window_masses(problem: Problem, k: int) -> Candidates:
    """The first block and the `k - 1` most recent ones (StreamingLLM, arXiv:2309.17453), as candidates of mass 1."""
    recent = problem.diagonal - torch.arange(max(k - 1, 1), device=problem.keys.device)
    recent = recent.expand(*problem.shape, -1)
    sink = problem.sink.expand(*problem.shape, 1)[..., : k - 1]
    blocks = torch.cat([recent, sink], -1)
    used = (blocks + 1) * problem.block_k > problem.first_key[:, None]
    used = used & (blocks >= 0)
    fresh = ~(recent == sink[..., :1]).any(-1, keepdim=True) if k > 1 else None
    if fresh is not None:
        used = torch.cat([used[..., :-1], used[..., -1:] & fresh], -1)
    return blocks.clamp(min=0), used.float() * 2.0 - 1.0


def random_masses(problem: Problem, generator: torch.Generator) -> Candidates:
    """Every block that the mask leaves, with a random mass: the same one in every text, so that a batch is its texts."""
    blocks, used = problem.readable_blocks()
    masses = torch.rand(blocks.shape[1:], generator=generator, device=generator.device).to(blocks.device)
    return blocks, masses.expand(blocks.shape).masked_fill(~used, -1.0)
