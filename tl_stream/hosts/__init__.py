"""What differs between the kinds of models that TransformerLens has: where the seam is, and where masks come from.

A host is a module with `why_not(model)`, `install(model, origin_of, stack)` and `unchanged_on_error(run_arguments)`:
one for HookedTransformer, one for TransformerBridge.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from transformer_lens.model_bridge import TransformerBridge


def model_classes() -> dict[type, str]:
    """The classes of models that can be traced, and the modules of their hosts."""
    classes: dict[type, str] = {TransformerBridge: "transformer_bridge"}
    try:
        from transformer_lens import HookedTransformer  # not in version 4
    except ImportError:
        return classes
    return {HookedTransformer: "hooked_transformer", **classes}


def host_of(model: Any) -> ModuleType:
    """The host of a model.

    Raises:
        TypeError: Not a model that can be traced.
        ValueError: A model of the right class that can't be traced; says why.
    """
    for kind, name in model_classes().items():
        if isinstance(model, kind):
            host = import_module(f"tl_stream.hosts.{name}")
            reason = host.why_not(model)
            if reason:
                raise ValueError(f"model can't be traced: {reason}.")
            return host
    expected = " or a ".join(kind.__name__ for kind in model_classes())
    raise TypeError(
        f"model was a {type(model).__name__}; expected a {expected} of transformer_lens (encoders and encoder-decoder "
        "models are not causal, and remote drivers don't compute attention here)."
    )
