"""`pattern.mT @ x`: what each key is read with, summed over the queries."""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.functional import pad

from tl_stream.tensors.block_sparse import BlockSparseTensor

_PRODUCTS_AT_ONCE = 2**22


def transposed_matmul(pattern: BlockSparseTensor, x: Shaped[Tensor, "*_ query_pos d"]) -> Shaped[Tensor, "*_ key_pos d"]:
    """`pattern.mT @ x` on the kept entries; `x` broadcasts over batch and heads. O(values) time.

    Raises:
        ValueError: More values than are ever made at once.
    """
    layout, rows, values = pattern.block_layout, pattern._view.rows, pattern.shown_values()
    lead, (batch, heads, n_blocks) = pattern.shape[:-2], values.shape[:3]
    full = x.expand(*lead, *x.shape[-2:]).reshape(batch, heads, *x.shape[-2:]).to(values.dtype)
    end = n_blocks * layout.block_q
    full = pad(full, (0, 0, rows.start, end - rows.stop)).unflatten(2, (n_blocks, -1))
    indices, used = layout.rows()
    slots = torch.where(used, indices, layout.n_kv_blocks)
    result = values.new_zeros(batch, heads, layout.n_kv_blocks + 1, layout.block_k, x.shape[-1])
    step = max(1, _PRODUCTS_AT_ONCE // max(1, batch * heads * values.shape[-1] * x.shape[-1]))
    for start in range(0, n_blocks, step):
        part = slice(start, start + step)
        products = values[:, :, part].transpose(-1, -2) @ full[:, :, part]
        blocks = products.unflatten(3, (-1, layout.block_k)).flatten(2, 3)
        index = slots[:, :, part].flatten(2)[..., None, None].expand(blocks.shape)
        result = result.scatter_add(2, index, blocks)
    z = result[:, :, : layout.n_kv_blocks].flatten(2, 3)[:, :, : pattern.shape[-1]]
    return pattern.drop_indexed(z).to(torch.promote_types(pattern.dtype, x.dtype))
