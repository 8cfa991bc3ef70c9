"""What differs between the kinds of models that TransformerLens has: where the seam is, and where masks come from.

A host is a module with `why_not(model)`, `attention_layers(model)`, `keywords(model)`, `install(model, installation)` and
`unchanged_on_error(run_arguments)`: one for HookedTransformer, one for TransformerBridge.
"""

from __future__ import annotations

from dataclasses import dataclass
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
            reason = _without_data(model) or host.why_not(model)
            if reason:
                raise ValueError(f"model can't be traced: {reason}.")
            return host
    expected = " or a ".join(kind.__name__ for kind in model_classes())
    raise TypeError(
        f"model was a {type(model).__name__}; expected a {expected} of transformer_lens (encoders and encoder-decoder "
        "models are not causal, and remote drivers don't compute attention here)."
    )


def _without_data(model: Any) -> str | None:
    """Why a model that is only a skeleton can't be traced; weights that accelerate brings in when they are needed are there."""
    brought_in = hasattr(getattr(model, "original_model", None), "hf_device_map")
    if brought_in or not any(parameter.is_meta for parameter in model.parameters()):
        return None
    return "its weights are on the meta device, where tensors have no data; load them (to_empty() makes room for them)"


@dataclass(frozen=True)
class Support:
    """Whether a model can be traced: true or false, and why.

    Attributes:
        layers: The layers whose attention is traced; others (of hybrid models) run as they are.
        reason: Why the model can't be traced; None where it can.
    """

    layers: tuple[int, ...]
    reason: str | None

    def __bool__(self) -> bool:
        return self.reason is None


def supports(model: Any) -> Support:
    """Whether `run_with_sparse_cache` and `sparse` take a model; if not, for what reason.

    Runs nothing of the model, but tries a user's own steps between q . k and the softmax, where there are any, on a few zeros.
    """
    try:
        host = host_of(model)
    except (TypeError, ValueError) as error:
        return Support((), str(error))
    return Support(tuple(host.attention_layers(model)), None)
