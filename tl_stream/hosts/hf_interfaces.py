"""Hugging Face's two points of extension, used while tracing: the mask interface and the attention interface.

Under an own name, masks arrive as predicates and leave as `MaskTensor`s, and attention modules that TransformerLens leaves
alone call us with their queries, keys and values.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tl_stream.hosts.overrides import Overrides, standing
from tl_stream.hosts.own_code import functions_in, is_own
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
    """`attention` computes attention under `configs`, which get `MaskTensor`s for masks, meanwhile.

    A user's own mask function, registered beside his attention, is called as it is.
    """
    for config in configs:
        own = _Name(f"tl_stream_{next(_numbers)}")
        own.before, own.is_on = config._attn_implementation_internal, overrides.is_on
        make = mask_function(own.before)
        if make is not None:
            overrides.put(AttentionMaskInterface._global_mapping, str(own), make)
        overrides.put(AttentionInterface._global_mapping, str(own), attention)
        overrides.put(config.__dict__, "_attn_implementation_internal", own)


def mask_function(name: str | None) -> Callable[..., Any] | None:
    """What makes masks under the implementation `name` while tracing: `make_mask`, or a user's; None where nothing does."""
    named = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if named is None:
        return make_mask if name is None else None
    return make_mask if is_own(named) else named


def users_attention(module: Module) -> Callable[..., Any] | None:
    """The function that computes attention for `module` untraced, where a user wrote it; None where it is Hugging Face's.

    That is what its config names in `AttentionInterface`, or else the default that its forward gives to it.
    """
    named = ALL_ATTENTION_FUNCTIONS.get(implementation_of(module))
    candidates = [named] if named else [each for each in functions_in(standing(module, "forward")) if _is_attention(each)]
    return next((each for each in candidates if not is_own(each)), None)


def implementation_of(module: Module) -> str | None:
    """The name of the implementation in a module's config, as it is without us."""
    name = getattr(getattr(module, "config", None), "_attn_implementation_internal", None)
    return name.before if isinstance(name, _Name) else name


def _is_attention(function: Any) -> bool:
    return list(inspect.signature(function).parameters)[:4] == ["module", "query", "key", "value"]


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
