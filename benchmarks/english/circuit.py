"""An induction head to start from (Olsson et al. 2022, arXiv:2209.11895): two heads that training then refines.

Training at this size and for this long finds none by itself, repeated sequences or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tl_stream.models.decoder import Attention, Decoder, rotary_base

CONSTANT = 0.1
FAST_PAIRS = 8
"""Rotary pairs, the fastest, by which the first head tells the previous token from others."""
SLOW_PAIRS = 12
"""Rotary pairs, the slowest, in which the second head matches tokens at any distance."""
MATCH = 1.75
"""Factor on that head's queries and keys: a match stands out from chance by about eight nats."""
COPIED = 0.05
"""Factor on what the heads write, so that it is about as large as an embedding."""


@torch.no_grad()
def start_induction(model: Decoder) -> None:
    """Sets head 0 of layer 0 to copy the previous token, head 0 of layer 1 to find tokens copied thus that equal its own.

    The first has constant queries and keys, made of an entry that all embeddings share, whose rotary angles agree when the
    key is one position before the query. What it copies of a token are `d_head` numbers; the second takes some of these
    as its keys, the same numbers of its own token as its query, and copies the token it then finds.
    """
    layers: Any = model.model.layers
    first, second = layers[0].self_attn, layers[1].self_attn
    d_head, d_model = first.d_head, model.config.hidden_size
    fast, slow = torch.arange(FAST_PAIRS), torch.arange(d_head // 2 - SLOW_PAIRS, d_head // 2)
    angles = rotary_base(model.config) ** (-2 * fast / d_head)
    read, write, copy = (nn.init.orthogonal_(torch.empty(d_head, d_model)) for _ in range(3))
    model.model.embed_tokens.weight[:, 0] = CONSTANT
    first.q_proj.weight[fast, 0] = 1.0
    first.k_proj.weight[fast, 0] = angles.cos()
    first.k_proj.weight[fast + d_head // 2, 0] = angles.sin()
    _copy(first, read, write)
    _copy(second, copy, copy)
    matched = torch.cat([slow, slow + d_head // 2])
    second.q_proj.weight[matched] = MATCH * _without_constant(read)[: len(matched)]
    second.k_proj.weight[matched] = MATCH * _without_constant(write)[: len(matched)]


def _copy(attention: Attention, read: Tensor, write: Tensor) -> None:
    d_head = read.shape[0]
    attention.v_proj.weight[:d_head] = _without_constant(read)
    attention.o_proj.weight[:, :d_head] = COPIED * _without_constant(write).T


def _without_constant(weight: Tensor) -> Tensor:
    return weight * (torch.arange(weight.shape[1]) > 0)
