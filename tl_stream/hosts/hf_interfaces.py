"""Hugging Face's two points of extension, used while tracing: the mask interface and the attention interface.

Under an own name, masks arrive as predicates and leave as `MaskTensor`s, and attention modules that TransformerLens leaves
alone call us with their queries, keys and values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tl_stream.hosts.overrides import Overrides
from tl_stream.hosts.predicates import mask_from_predicate
from tl_stream.masking import AttentionMask
from tl_stream.tensors.mask_tensor import MaskTensor

_numbers = itertools.count()


class _Name(str):
    """The name of our implementation; where the model isn't traced, as good as the name that stood there before.

    A deep copy of a config that holds it holds that one.
    """

    before: Any
    is_on: Callable[[], bool]

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True if self.is_on() else bool(self.before == other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return str.__hash__(self) if self.is_on() else hash(self.before)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.before


def own_implementation(overrides: Overrides, configs: Iterable[Any], attention: Callable[..., Any]) -> None:
    """`attention` computes attention under `configs`, which get `MaskTensor`s for masks, meanwhile."""
    name = f"tl_stream_{next(_numbers)}"
    overrides.put(AttentionMaskInterface._global_mapping, name, make_mask)
    overrides.put(AttentionInterface._global_mapping, name, attention)
    for config in configs:
        own = _Name(name)
        own.before, own.is_on = config._attn_implementation_internal, overrides.is_on
        overrides.put(config.__dict__, "_attn_implementation_internal", own)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    **_: Any,
) -> MaskTensor:
    """A mask as `transformers.AttentionMaskInterface` asks for it, without making it.

    Args:
        batch_size: Number of texts.
        q_length: Number of queries.
        kv_length: Number of keys.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        mask_function: `(batch, head, query_pos, key_pos) -> bool`, positions absolute; None: causal.
        attention_mask: Which tokens are no padding, `[batch, pos]`.
        device: Where the mask lives.
        dtype: Of the dense mask that this one stands for.
        _: What other implementations take.
    """
    texts = torch.arange(batch_size, device=device)[:, None]
    first_query, first_key = int(q_offset), int(kv_offset)

    def allows(rows: Tensor, keys: Tensor) -> Tensor:
        if mask_function is None:
            return keys + first_key <= rows + first_query
        allowed = mask_function(texts, 0, rows + first_query, keys + first_key)
        return torch.as_tensor(allowed, device=device)

    def make() -> AttentionMask:
        mask = mask_from_predicate(allows, q_length, kv_length, first_query - first_key, device)
        if attention_mask is None:
            return mask
        valid = attention_mask[:, first_key : first_key + kv_length].bool()
        valid = torch.nn.functional.pad(valid, (0, kv_length - valid.shape[1]))
        return mask if bool(valid.all()) else mask.with_padding(valid)

    return MaskTensor(make, (batch_size, 1, q_length, kv_length), dtype, device)
