"""An induction head to start from (Olsson et al. 2022, arXiv:2209.11895): two heads that training then refines.

Training at this size and for this long finds none by itself, repeated sequences or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tl_stream.models.decoder import Attention, Decoder, rotary_base

EMBEDDING = 2.0
"""Factor on the embeddings, so that a token that the head copies gets a large enough logit to be learned from."""
CONSTANT = 0.2
"""The entry that all embeddings share."""
PREVIOUS = 1.5
FAST_PAIRS = 8
"""Factor on the first head's queries and keys, and the rotary pairs, the fastest, by which it tells the previous token."""
MATCH = 3.5
SLOW_PAIRS = 16
"""Factor on the second head's, and the rotary pairs, the slowest, in which it matches tokens at any distance."""
COPIED = 0.2, 0.6
"""Factors on what the two heads write."""


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
    read, write, copy = nn.init.orthogonal_(torch.empty(3 * d_head, d_model)).split(d_head)
    model.model.embed_tokens.weight *= EMBEDDING
    model.model.embed_tokens.weight[:, 0] = CONSTANT
    first.q_proj.weight[fast, 0] = PREVIOUS
    first.k_proj.weight[fast, 0] = PREVIOUS * angles.cos()
    first.k_proj.weight[fast + d_head // 2, 0] = PREVIOUS * angles.sin()
    _copy(first, read, COPIED[0] * write)
    _copy(second, copy, COPIED[1] * copy)
    matched = torch.cat([slow, slow + d_head // 2])
    second.q_proj.weight[matched] = MATCH * _without_constant(read)[: len(matched)]
    second.k_proj.weight[matched] = MATCH * _without_constant(write)[: len(matched)]


def _copy(attention: Attention, read: Tensor, write: Tensor) -> None:
    d_head = read.shape[0]
    attention.v_proj.weight[:d_head] = _without_constant(read)
    attention.o_proj.weight[:, :d_head] = _without_constant(write).T


def _without_constant(weight: Tensor) -> Tensor:
    return weight * (torch.arange(weight.shape[1]) > 0)
