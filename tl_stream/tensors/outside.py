"""What edits do to the entries that were not recorded (`forward="exact"`), where that is one factor and one shift a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_stream.layout import BlockLayout
from tl_stream.tensors.rest import Rest
from tl_stream.tensors.view import View
from tl_stream.tensors.wrapper import SparseTensor

PerRow = float | Float[Tensor, "_ _ _ 1"]


@dataclass(frozen=True, eq=False)
class Outside:
    """`factor * entry + shift`, for every entry that was not recorded.

    Attributes:
        of: The data (`BlockData`) whose entries those are, as the model had them; None: what became of them is not known.
        factor: One for all rows, or one a row.
        shift: Likewise.
    """

    of: Any
    factor: PerRow = 1.0
    shift: PerRow = 0.0

    def rest(self) -> Rest | None:
        """What the model reads outside the record, so edited; None where that is not known."""
        rest = None if self.of is None else self.of.model_rest()
        return None if rest is None else rest.edited(self.factor, self.shift)

    def edit(
        self, x: Float[Tensor, "batch head_index q_block block_q key"]
    ) -> Float[Tensor, "batch head_index q_block block_q key"]:
        """Entries as the model had them, edited."""
        return x * _by_block(self.factor, x) + _by_block(self.shift, x)

    def change(self, change: Callable[[PerRow], PerRow]) -> Outside:
        """The same change of factor and shift."""
        return replace(self, factor=change(self.factor), shift=change(self.shift))

    def of_view(self, view: View, device: torch.device) -> Outside:
        """That of the texts and heads that a view shows."""
        texts, heads = view.texts(device), view.heads(device)
        return self.change(lambda x: x[texts][:, heads] if isinstance(x, Tensor) else x)

    def with_rows(self, view: View, layout: BlockLayout, new: Outside) -> Outside:
        """`new` (on as many texts, heads and rows as `view` shows) in place of what was known of those rows."""
        if self.of is None or new.of is None:
            return Outside(None)
        device = layout.device

        def put(old: PerRow, other: PerRow) -> Tensor:
            full = torch.as_tensor(old, dtype=torch.double, device=device).expand(*layout.shape[:3], 1)
            rows = torch.arange(view.rows.start, view.rows.stop, device=device)
            at = view.texts(device)[:, None, None], view.heads(device)[:, None], rows
            size = (*torch.broadcast_shapes(*(x.shape for x in at)), 1)
            return full.index_put(at, torch.as_tensor(other, dtype=torch.double, device=device).expand(size))

        return Outside(self.of, put(self.factor, new.factor), put(self.shift, new.shift))


def _by_block(x: PerRow, like: Tensor) -> Any:
    """One number a row, as it broadcasts against values on blocks; the padding of the last block gets that of the last row."""
    if not isinstance(x, Tensor):
        return x
    rows = torch.arange(like.shape[2] * like.shape[3], device=x.device).clamp(max=x.shape[2] - 1)
    return x[:, :, rows].to(like.dtype).unflatten(2, like.shape[2:4])


def after(name: str, args: tuple, kwargs: dict, tensor: Any) -> Outside:
    """What lies outside the result of an operation entry by entry, `tensor` being the sparse operand that leads."""
    unknown = Outside(None)
    place = next((i for i, x in enumerate(args) if x is tensor), None)
    if name not in _AFFINE or kwargs or place is None or len(args) > 2:
        return unknown
    own = tensor._data.edits.of_view(tensor._view, tensor.device)
    if len(args) == 1:
        return _AFFINE[name](own, 0.0)
    other = _per_row(args[1 - place], tensor)
    if other is None or (place == 1 and name not in _EITHER_WAY):
        return unknown
    return _AFFINE[_EITHER_WAY[name] if place == 1 else name](own, other)


def _per_row(x: Any, tensor: Any) -> PerRow | None:
    """An operand that is constant along the keys, for the texts and heads shown and all rows; None for another."""
    if not isinstance(x, Tensor):
        return float(x) if isinstance(x, int | float) else None
    if isinstance(x, SparseTensor) or (x.dim() and x.shape[-1] != 1):
        return None
    view, layout = tensor._view, tensor._data.layout
    full = x.as_subclass(Tensor).to(layout.device).expand(*tensor.shape[:-1], 1)
    full = full.unsqueeze(-3) if isinstance(view.head, int) else full
    full = full.unsqueeze(0) if isinstance(view.batch, int) else full
    return torch.nn.functional.pad(full, (0, 0, view.rows.start, layout.shape[2] - view.rows.stop))


def _mul(own: Outside, x: PerRow) -> Outside:
    return own.change(lambda y: y * x)


def _div(own: Outside, x: PerRow) -> Outside:
    return own.change(lambda y: y / x)


def _add(own: Outside, x: PerRow) -> Outside:
    return replace(own, shift=own.shift + x)


def _sub(own: Outside, x: PerRow) -> Outside:
    return replace(own, shift=own.shift - x)


def _rsub(own: Outside, x: PerRow) -> Outside:
    return Outside(own.of, -own.factor, x - own.shift)


_AFFINE: dict[str, Callable[[Outside, PerRow], Outside]] = {
    **dict.fromkeys(("mul", "multiply", "rmul"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide", "truediv"), _div),
    **dict.fromkeys(("add", "radd"), _add),
    **dict.fromkeys(("sub", "subtract"), _sub),
    **dict.fromkeys(("rsub", "neg", "negative"), _rsub),
}
_EITHER_WAY = {"mul": "mul", "multiply": "mul", "add": "add", "sub": "rsub", "subtract": "rsub"}
