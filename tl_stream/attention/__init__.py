"""Attention over the kept blocks only."""

from tl_stream.attention.sparse import sparse_attention

__all__ = ["sparse_attention"]
