"""Sparse tensors as named ordinary tensors and a JSON-able description, and back; also for pickle and `torch.save`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tl_stream import score_mod
from tl_stream.config import StreamConfig
from tl_stream.layout import BlockLayout
from tl_stream.masking import AttentionMask
from tl_stream.tensors.arranged import ArrangedTensor, arrange
from tl_stream.tensors.block_sparse import BlockSparsePattern, BlockSparseScores, BlockSparseTensor
from tl_stream.tensors.data import BlockData
from tl_stream.tensors.joined import JoinedTensor
from tl_stream.tensors.lazy_data import LazyData
from tl_stream.tensors.of_parts import TensorOfParts
from tl_stream.tensors.pattern_data import PatternData
from tl_stream.tensors.products import Origin, Products
from tl_stream.tensors.scores_data import ScoresData
from tl_stream.tensors.stacked import StackedTensor
from tl_stream.tensors.view import View
from tl_stream.tensors.wrapper import SparseTensor

_KINDS = {cls.__name__: cls for cls in (BlockSparseTensor, BlockSparseScores, BlockSparsePattern)}
_DATA = {cls.__name__: cls for cls in (BlockData, ScoresData, PatternData)}
_MODS: dict[str, Callable[..., Any]] = {
    cls.__name__: cls
    for cls in (score_mod.Scale, score_mod.Tanh, score_mod.Alibi, score_mod.Bias, score_mod.OnSubset, score_mod.FromRow)
}


class Packer:
    """Collects tensors under names; memory that several share is stored once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._keep: list[Tensor] = []

    def add(self, tensor: Tensor | None) -> dict[str, Any] | None:
        """Store a tensor (detached, contiguous); what is returned finds it again."""
        if tensor is None:
            return None
        swapped = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.transpose(1, 2).is_contiguous()
        ordered = (tensor.transpose(1, 2) if swapped else tensor).detach().contiguous()
        identity = (ordered.data_ptr(), ordered.numel(), ordered.dtype)
        if identity not in self._names:
            self._names[identity] = str(len(self.tensors))
            self._keep.append(ordered)  # while it lives, no other tensor gets its address
            part_of_more = ordered.untyped_storage().nbytes() > ordered.nbytes
            self.tensors[self._names[identity]] = ordered.flatten().clone() if part_of_more else ordered.flatten()
        return {"name": self._names[identity], "shape": list(ordered.shape), "swapped": swapped}

    def pack(self, tensor: Tensor) -> dict[str, Any]:
        """Any activation: an ordinary tensor or a sparse one."""
        if isinstance(tensor, ArrangedTensor):
            return {"kind": "ArrangedTensor", "base": self.pack(tensor.base), "groups": tensor.arrangement.groups}
        if isinstance(tensor, TensorOfParts):
            return {"kind": type(tensor).__name__, "parts": [self.pack(part) for part in tensor.parts]}
        if not isinstance(tensor, BlockSparseTensor):
            return {"kind": "Tensor", "tensor": self.add(tensor)}
        data, view = tensor._data, tensor._view
        return {
            "kind": type(tensor).__name__,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "view": [_axis(view.batch), _axis(view.head), _axis(view.rows), view.n_keys],
            "data": type(data).__name__,
            "fill": data.fill,
            "layer": data.origin.layer,
            "dense": data.origin.dense,
            "layout": self._layout(data.layout),
            "values": self.add(data.values),
            "products": self._products(data.products) if isinstance(data, LazyData) else None,
            "lse": self.add(data.lse) if isinstance(data, PatternData) else None,
            "is_exact": isinstance(data, PatternData) and data.is_exact,
        }

    def _layout(self, layout: BlockLayout) -> dict[str, Any]:
        mask = layout.mask
        return {
            "kv_indices": self.add(layout.kv_indices),
            "kv_num_blocks": self.add(layout.kv_num_blocks),
            "sizes": [layout.block_q, layout.block_k, layout.batch, layout.n_heads],
            "mask": [self.add(mask.start), self.add(mask.stop), mask.key_length, self.add(mask.key_valid), self.add(mask.real)],
        }

    def _products(self, products: Products) -> dict[str, Any]:
        return {
            "q": self.add(products.q),
            "k": self.add(products.k),
            "scale": products.scale,
            "sink": self.add(products.sink),
            "mods": [self._mod(mod) for mod in products.score_mods],
        }

    def _mod(self, mod: Any) -> dict[str, Any]:
        name = type(mod).__name__
        if name not in _MODS:
            raise TypeError(f"A score mod of type {name} can't be stored; expected one of {', '.join(_MODS)}.")
        return {"kind": name} | {field.name: self._setting(getattr(mod, field.name)) for field in fields(mod)}

    def _setting(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self.add(value)}
        return value if isinstance(value, int | float) else self._mod(value)


class Unpacker:
    """The inverse of `Packer`."""

    def __init__(self, tensors: dict[str, Tensor], config: StreamConfig, fallbacks: Counter[str]) -> None:
        self.tensors, self.config, self.fallbacks = tensors, config, fallbacks

    def get(self, entry: dict[str, Any] | None) -> Tensor | None:
        """What `Packer.add` stored."""
        if entry is None:
            return None
        tensor = self.tensors[entry["name"]].view(entry["shape"])
        return tensor.transpose(1, 2) if entry["swapped"] else tensor

    def unpack(self, entry: dict[str, Any]) -> Any:
        """What `Packer.pack` described."""
        if entry["kind"] == "Tensor":
            return self._tensor(entry["tensor"])
        if entry["kind"] == "ArrangedTensor":
            return arrange(self.unpack(entry["base"]), tuple(tuple(group) for group in entry["groups"]))
        if "parts" in entry:
            kind = JoinedTensor if entry["kind"] == "JoinedTensor" else StackedTensor
            return kind(tuple(self.unpack(part) for part in entry["parts"]))
        origin = Origin(self.config, entry["layer"], entry["dense"], self.fallbacks)
        data = _DATA[entry["data"]](self._layout(entry["layout"]), entry["fill"], origin, self.get(entry["values"]))
        products = None
        if isinstance(data, LazyData):
            products = self._products(entry["products"])
            data.of(products)
        if isinstance(data, PatternData):
            data.lse, data.is_exact = self.get(entry["lse"]), entry.get("is_exact", False)
        batch, head, rows, n_keys = entry["view"]
        view = View(_from_axis(batch), _from_axis(head), range(*rows), n_keys)
        return _KINDS[entry["kind"]](data, view, getattr(torch, entry["dtype"]), detached=True)

    def _tensor(self, entry: dict[str, Any]) -> Tensor:
        tensor = self.get(entry)
        assert tensor is not None
        return tensor

    def _layout(self, entry: dict[str, Any]) -> BlockLayout:
        start, stop, key_length, *padding = entry["mask"]  # files of before 0.2 know key_valid alone
        mask = AttentionMask(self.get(start), self._tensor(stop), key_length, *map(self.get, padding))
        return BlockLayout(self.get(entry["kv_indices"]), self.get(entry["kv_num_blocks"]), mask, *entry["sizes"])

    def _products(self, entry: dict[str, Any]) -> Products:
        mods = tuple(self._setting(mod) for mod in entry["mods"])
        return Products(self._tensor(entry["q"]), self._tensor(entry["k"]), entry["scale"], mods, self.get(entry["sink"]))

    def _setting(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return self.get(value["tensor"])
        return _MODS[value["kind"]](**{key: self._setting(x) for key, x in value.items() if key != "kind"})


def reduced(tensor: SparseTensor) -> tuple[Any, ...]:
    """A sparse tensor for pickle: q, k, layout and log-sum-exp, or the kept values where it was written to; no gradients."""
    packer = Packer()
    description = packer.pack(tensor)
    return rebuild, (packer.tensors, description, tensor.origin.config.to_json())


def rebuild(tensors: dict[str, Tensor], description: dict[str, Any], settings: dict[str, Any]) -> Tensor:
    """What `reduced` took apart."""
    return Unpacker(tensors, StreamConfig.from_json(settings), Counter()).unpack(description)


torch.serialization.add_safe_globals([rebuild])


def _axis(axis: int | range) -> int | list[int]:
    return axis if isinstance(axis, int) else [axis.start, axis.stop, axis.step]


def _from_axis(axis: int | list[int]) -> int | range:
    return axis if isinstance(axis, int) else range(*axis)


def parts(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors that hold the memory of an activation."""
    return tensor.stored_tensors() if isinstance(tensor, SparseTensor) else [tensor]


def new_bytes(tensor: Tensor, seen: set[int]) -> int:
    """Bytes of a tensor's memory, if it isn't among those seen; it is from now on."""
    with torch._C.DisableTorchFunctionSubclass():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
