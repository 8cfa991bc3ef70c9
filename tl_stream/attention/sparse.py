"""`sparse_attention`: one call, several backends."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from tl_stream.config import BACKENDS
from tl_stream.layout import BlockLayout
from tl_stream.precision import outside_autocast
from tl_stream.score_mod import ScoreMod


@outside_autocast
def sparse_attention(
    q: Float[Tensor, "batch head_index query_pos d_head"],
    k: Float[Tensor, "batch kv_head_index key_pos d_head"],
    v: Float[Tensor, "batch v_head_index key_pos d_v"],
    layout: BlockLayout,
    *,
    scale: float | None = None,
    score_mods: Sequence[ScoreMod] = (),
    sink: Float[Tensor, "_ _ _ 1"] | None = None,
    backend: str = "gather",
) -> tuple[Float[Tensor, "batch head_index query_pos d_v"], Float[Tensor, "batch head_index query_pos"]]:
    """Softmax attention over the entries that `layout` keeps.

    Args:
        q: Queries; their heads are a multiple of k's and of v's.
        k: Keys.
        v: Values.
        layout: Kept blocks and mask.
        scale: Factor on q . k; None: `d_head ** -0.5`.
        score_mods: Applied to the scaled scores in turn.
        sink: A further logit a row that takes part in the softmax but has no value (GPT-OSS),
            `[batch or 1, head_index or 1, query_pos or 1, 1]`.
        backend: `"gather"` or `"reference"`.

    Returns:
        z, and each row's log-sum-exp (natural log, sink included) over its kept keys, in float32 or better. A row that
        may read nothing gives z = 0.

    Raises:
        ValueError: Unknown backend, or shapes that don't fit the layout.
    """
    expected = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if layout.shape != expected:
        raise ValueError(f"layout was for {layout.shape}; expected [batch, head_index, query_pos, key_pos] = {expected}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    match backend:
        case "gather":
            from tl_stream.attention.gather import gather_attention as attend
        case "reference":
            from tl_stream.attention.reference import reference_attention as attend
        case _:
            raise ValueError(f"backend was {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}.")
    return attend(q, k, v, layout, scale=scale, score_mods=score_mods, sink=sink)
