"""How much of a prompt's attention is kept while a model generates from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tl_stream.cache import is_pattern
from tl_stream.hosts.uninterrupted import Uninterrupted
from tl_stream.tensors import BlockSparsePattern
from tl_stream.tensors.joined import JoinedTensor


@dataclass
class PromptPairs:
    """Counts, once a layer: later passes are steps of generation.

    Attributes:
        kept: Token pairs that are kept, over batch, layers and heads.
        allowed: Those that the masks allow.
    """

    kept: int = 0
    allowed: int = 0

    def counted(self, model: Any) -> Any:
        """A context in which what the model reads first is counted."""
        seen: set[str] = set()

        def note(pattern: Tensor, hook: Any) -> None:
            if isinstance(pattern, BlockSparsePattern | JoinedTensor) and hook.name not in seen:
                seen.add(hook.name)
                self.kept += pattern.block_layout.n_kept_pairs
                self.allowed += pattern.block_layout.n_pairs

        return Uninterrupted(model.hooks(fwd_hooks=[(is_pattern, note)]))

    @property
    def pruned(self) -> float:
        """Share of the token pairs that were dropped."""
        return 1.0 - self.kept / self.allowed if self.allowed else 0.0
