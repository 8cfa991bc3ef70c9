"""How much of a prompt's attention is kept while a model generates from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tl_stream.cache import is_pattern
from tl_stream.hosts.uninterrupted import Uninterrupted
from tl_stream.pairs import Pairs
from tl_stream.tensors import BlockSparsePattern
from tl_stream.tensors.joined import JoinedTensor


@dataclass
class PromptPairs(Pairs):
    """Counts the first pass of every layer: later passes are steps of generation."""

    def counted(self, model: Any) -> Any:
        """A context in which what the model reads first is counted."""
        seen: set[str] = set()

        def note(pattern: Tensor, hook: Any) -> None:
            if isinstance(pattern, BlockSparsePattern | JoinedTensor) and hook.name not in seen:
                seen.add(hook.name)
                self.add(pattern.block_layout)

        return Uninterrupted(model.hooks(fwd_hooks=[(is_pattern, note)]))
