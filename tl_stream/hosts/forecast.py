"""What the cache of a run is going to hold, said while most of it is still to come.

The sizes of activations depend on the family, its hook points, and which of them share memory; so the first layer tells: what
its activations hold when it has run, times how often their names come in all layers. What the run caches after the last layer
is known by its shape.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.tensors.storage import new_bytes, parts

ADVICE = 'names_filter=lambda name: name.endswith(("hook_pattern", "hook_z"))'
_said: WeakSet[Any] = WeakSet()  # models of which it was said


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that can still be taken; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else None


@contextmanager
def foretold(model: Any, logits_to_keep: int | None, arguments: dict[str, Any]) -> Iterator[None]:
    """Within this context a `run_with_cache` warns, once its first cached layer has run, of a cache that is going to hold more
    than half of what is free; once a model.

    Args:
        model: A HookedTransformer or TransformerBridge.
        logits_to_keep: How many positions are unembedded; None: all.
        arguments: Those of `run_with_cache` by name.
    """
    names = list(filter(_as_function(arguments.get("names_filter")), model.hook_dict))
    forecast = _Forecast(model, logits_to_keep, arguments, names, Counter(map(_layer, names)))
    first = min((layer for layer in forecast.by_layer if layer is not None), default=-1)
    if first + 1 not in forecast.by_layer or model in _said:  # the only layer tells too late
        yield
        return
    watched = {name: model.hook_dict[name] for name in names if _layer(name) in (None, first)}
    handles = [point.register_forward_hook(partial(forecast.note, name)) for name, point in watched.items()]
    handles.append(model.blocks[first + 1].register_forward_pre_hook(forecast.tell, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Forecast:
    """What is known of one run's cache.

    Attributes:
        model, logits_to_keep, arguments: As `foretold` takes them.
        names: The hook points whose activations are cached.
        by_layer: How many of these each layer has; None: those of no layer.
        held: What they gave so far, by name: of one that fires again, the last.
    """

    model: Any
    logits_to_keep: int | None
    arguments: dict[str, Any]
    names: list[str]
    by_layer: Counter[int | None]
    held: dict[str, Tensor] = field(default_factory=dict)

    def note(self, name: str, point: Any, args: Any, output: Any) -> None:
        """A hook point has fired."""
        output = output[0] if isinstance(output, tuple) and output else output
        if isinstance(output, Tensor):
            self.held[name] = output

    def tell(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Warn where there is cause to; called when the first cached layer has run."""
        resid = args[0] if args else kwargs.get("hidden_states")
        if not self.held or not isinstance(resid, Tensor) or resid.dim() != 3:
            return
        layer, total = self._bytes(resid)
        self.held.clear()
        device = torch.device(self.arguments.get("device") or resid.device)
        free = free_bytes(device)
        if free is None or 2 * total <= free or self.model in _said:
            return
        _said.add(self.model)
        warnings.warn(
            f"The cache of this run is going to hold about {total / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free on {device}. "
            f"(The first layer that it holds takes {layer / 1e9:.3g} GB.) Cache less: {ADVICE}, for example, or fewer layers.",
            stacklevel=2,
        )

    def _bytes(self, resid: Float[Tensor, "batch pos d_model"]) -> tuple[int, int]:
        """What the first layer holds, and what the cache will hold at the end."""
        seen: set[int] = set()
        sizes = {name: sum(new_bytes(part, seen) for part in parts(tensor)) for name, tensor in self.held.items()}
        layer = sum(size for name, size in sizes.items() if _layer(name) is not None)
        before = sum(sizes.values()) - layer
        of_layers = {number: count for number, count in self.by_layer.items() if number is not None}
        total = before + layer * sum(of_layers.values()) // of_layers[min(of_layers)] + self._bytes_behind(resid)
        return layer, total * (2 if self.arguments.get("incl_bwd") else 1)

    def _bytes_behind(self, resid: Float[Tensor, "batch pos d_model"]) -> int:
        """What is held of the final norm, and of the logits."""
        (batch, length, width), numbers = resid.shape, 0
        if any(name.startswith("ln_final") for name in self.names):
            numbers += 2 * length * width
        if any(name.startswith("unembed") for name in self.names) and self.arguments.get("return_type", "logits") is not None:
            numbers += min(length, self.logits_to_keep or length) * self.model.cfg.d_vocab
        return batch * numbers * resid.element_size()


def _as_function(names_filter: Any) -> Callable[[str], bool]:
    if names_filter is None:
        return lambda name: True
    if callable(names_filter):
        return names_filter
    return lambda name: name in ([names_filter] if isinstance(names_filter, str) else names_filter)


def _layer(name: str) -> int | None:
    """Of which layer a hook point is; None: of none."""
    head, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if head == "blocks" else None
