"""What differs between the kinds of models that TransformerLens has: where the seam is, and where masks come from.

A host is a module with `why_not(model)`, `install(model, origin_of, stack)` and `unchanged_on_error(past_kv_cache)`.
HookedTransformer has one; the place of TransformerBridge's is beside it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any


def hooked_transformer_class() -> type | None:
    """TransformerLens's HookedTransformer, or None where this version has none (4 and later)."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return None
    return HookedTransformer


def host_of(model: Any) -> ModuleType:
    """The host of a model.

    Raises:
        TypeError: Not a model that can be traced.
        ValueError: A model of the right class that can't be traced; says why.
    """
    hooked = hooked_transformer_class()
    if hooked is None or not isinstance(model, hooked):
        raise TypeError(
            f"model was a {type(model).__name__}; expected a transformer_lens.HookedTransformer (encoders and encoder-decoder "
            "models are not causal and can't be traced)."
        )
    from tl_stream.hosts import hooked_transformer

    reason = hooked_transformer.why_not(model)
    if reason:
        raise ValueError(f"model can't be traced: {reason}.")
    return hooked_transformer
