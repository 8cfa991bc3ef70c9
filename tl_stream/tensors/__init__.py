"""The tensors that flow through the model in place of T x T scores and patterns."""

from tl_stream.tensors.block_sparse import BlockSparsePattern, BlockSparseScores, BlockSparseTensor
from tl_stream.tensors.scores import AttentionScores

__all__ = ["AttentionScores", "BlockSparsePattern", "BlockSparseScores", "BlockSparseTensor"]
