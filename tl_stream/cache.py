"""`SparseActivationCache`: TransformerLens's ActivationCache with sparse patterns, and what only they can tell."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.utilities import Slice

from tl_stream.audit import Audit, NextTokens, audit
from tl_stream.config import StreamConfig
from tl_stream.layout import BlockLayout
from tl_stream.pairs import Pairs
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.joined import JoinedTensor
from tl_stream.tensors.joined_layout import JoinedLayout
from tl_stream.tensors.retained import exact_rows
from tl_stream.tensors.storage import Packer, Unpacker, new_bytes, parts

_FORMAT = "tl_stream.SparseActivationCache/3"


def is_pattern(name: str) -> bool:
    """Whether a hook point is some layer's pattern; as a `names_filter`, all that an audit takes."""
    return name.endswith("hook_pattern")


class SparseActivationCache(ActivationCache):
    """The activations of a sparse run, under the keys of `run_with_cache`.

    `cache["pattern", layer]` is a `BlockSparsePattern`, `cache["attn_scores", layer]` a `BlockSparseScores`; everything else
    is an ordinary tensor. All numbers are exact for the sparse model; under `forward="exact"`, for the real one.

    Attributes:
        config: The config of the run.
        fallbacks: How often an operation unknown to the sparse tensors was made dense so far, by its name.
        next_tokens: What the run says next at its last positions, and how sure it is of it; the audit's verdict on an answer
            goes by it. None: the run gave no logits.
        of: What run this is of, where that isn't said by the call that returned it (`generate(return_cache=True)`); None: of
            the run of that call.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        has_batch_dim: bool = True,
        *,
        config: StreamConfig,
        fallbacks: Counter[str] | None = None,
        next_tokens: NextTokens | None = None,
        of: str | None = None,
    ) -> None:
        super().__init__(cache_dict, model, has_batch_dim)
        self.next_tokens = next_tokens
        self.of = of
        self.config = config
        self.fallbacks: Counter[str] = Counter() if fallbacks is None else fallbacks

    def __getitem__(self, key: Any) -> Any:
        """As `ActivationCache`: a name, or a tuple such as `("pattern", layer)`."""
        return super().__getitem__(key)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> SparseActivationCache:
        """As `ActivationCache.apply_slice_to_batch_dim`; patterns stay sparse."""
        part = super().apply_slice_to_batch_dim(batch_slice)
        known = None if self.next_tokens is None else self.next_tokens.slice(Slice.unwrap(batch_slice))
        return SparseActivationCache(
            part.cache_dict,
            self.model,
            part.has_batch_dim,
            config=self.config,
            fallbacks=self.fallbacks,
            next_tokens=known,
            of=self.of,
        )

    @property
    def patterns(self) -> dict[int, BlockSparseTensor | JoinedTensor]:
        """The cached patterns by layer."""
        return {
            tensor.origin.layer: tensor
            for name, tensor in self.cache_dict.items()
            if isinstance(tensor, BlockSparseTensor | JoinedTensor) and is_pattern(name)
        }

    def block_layout(self, layer: int) -> BlockLayout | JoinedLayout:
        """Kept blocks of a layer.

        Raises:
            KeyError: No pattern of that layer was cached.
        """
        if layer not in self.patterns:
            raise KeyError(f"layer was {layer}; expected one whose pattern is in the cache: {sorted(self.patterns)}.")
        return self.patterns[layer].block_layout

    @property
    def pruned(self) -> float:
        """1 - kept token pairs / allowed token pairs, over all cached patterns (dense layers included).

        Allowed is what the model's own masks allow: in layers with a sliding window, its pairs alone. `pruned_causal` is the
        share of all causal pairs. Under `forward="exact"` the model read all pairs; this is the share that was not recorded.

        Raises:
            ValueError: No pattern is in the cache.
        """
        return self._pairs().pruned

    @property
    def pruned_causal(self) -> float:
        """1 - kept token pairs / all causal token pairs, over all cached patterns: what windows hide counts as pruned, too.

        Without sliding windows the same as `pruned`.

        Raises:
            ValueError: No pattern is in the cache.
        """
        return self._pairs().pruned_causal

    def _pairs(self) -> Pairs:
        layouts = [pattern.block_layout for pattern in self.patterns.values()]
        if not layouts:
            raise ValueError("The cache holds no pattern; expected hook_pattern among names_filter.")
        return Pairs.of(layouts)

    def _pruned_by_kind(self) -> str:
        """What was pruned, in words; where some layers have a window, of which pairs, and by the layers' kind."""
        kinds: dict[int | None, list[BlockLayout | JoinedLayout]] = {}
        for pattern in self.patterns.values():
            kinds.setdefault(pattern.block_layout.mask.window, []).append(pattern.block_layout)
        pairs = self._pairs()
        text = f"pruned={pairs.pruned:.4f}"
        if pairs.pruned == pairs.pruned_causal:
            return text
        found = ", ".join(_kind(window, layouts) for window, layouts in kinds.items())
        return f"{text} of the pairs within windows, {pairs.pruned_causal:.4f} of all causal ones ({found})"

    def exact_rows(self, layer: int, rows: Sequence[int]) -> Float[Tensor, "*batch_and_head row key_pos"]:
        """Rows of the full softmax of this run's own q and k: what the pattern would have been with nothing pruned.

        Rows count as the cached pattern shows them (after `pos_slice`). This is not the dense model's pattern: its q and k
        differ once an earlier layer was pruned (under `forward="exact"` it is). O(T) a row and head.

        Raises:
            KeyError: No pattern of that layer was cached.
            IndexError: A row out of range.
            TypeError: The pattern was written to.
        """
        if layer not in self.patterns:
            raise KeyError(f"layer was {layer}; expected one whose pattern is in the cache: {sorted(self.patterns)}.")
        return exact_rows(self.patterns[layer], rows)

    def audit(
        self,
        rows: int | Sequence[int] = 1,
        sample: int = 64,
        *,
        reread: Float[Tensor, "batch row"] | None = None,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Audit:
        """What this run lost, what of it not to trust, and the chance that dense attention says otherwise; no dense run is
        needed. From one run that chance tells little; `tl_stream.recheck` knows more, by one more sparse run.

        The chosen rows' retained mass is exact; the mean over all rows is given as a confidence interval, from rows drawn
        without replacement, that holds whatever the distribution (`tl_stream.audit.interval`), and as an estimate
        (`tl_stream.audit.estimate`). All is relative to the full softmax of the run's own q and k, which are the dense
        model's only in the first layer. O(T) a row and head; the estimate O(T) for all rows. O(T) memory.

        Args:
            rows: The last so many rows of each text, padding left out, or query positions as the cached patterns show
                them (negative ones count from the end). The rows of an answer are those that generate it; 1 is the row of
                the next token.
            sample: How many of the other rows to draw in each layer.
            reread: What `tl_stream.recheck` found: the lead of this run's next tokens in that run, at the last positions.
            confidence: Of each interval, on its own.
            seed: Of the draw.

        Raises:
            ValueError: No pattern is in the cache, an argument is out of range, or `reread` isn't of the chosen rows.
            IndexError: A row out of range.
            TypeError: A pattern was written to.
        """
        lead = None if self.next_tokens is None else self.next_tokens.lead
        return audit(self.patterns, rows, sample, lead=lead, reread=reread, confidence=confidence, seed=seed)

    def memory(self) -> dict[str, int]:
        """Bytes that each activation keeps alive; memory that several share is counted at the first of them."""
        seen: set[int] = set()
        return {name: sum(new_bytes(part, seen) for part in parts(tensor)) for name, tensor in self.cache_dict.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache."""
        return sum(self.memory().values())

    def __copy__(self) -> SparseActivationCache:
        return self._with(self.cache_dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseActivationCache:
        """The activations are copied; the model is the same one."""
        return self._with(copy.deepcopy(self.cache_dict, memo))

    def _with(self, activations: dict[str, Tensor]) -> SparseActivationCache:
        return SparseActivationCache(
            activations,
            self.model,
            self.has_batch_dim,
            config=self.config,
            fallbacks=self.fallbacks,
            next_tokens=self.next_tokens,
            of=self.of,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: it would take the model along, hooks included."""
        raise TypeError(
            "A SparseActivationCache can't be pickled (torch.save pickles, too), since it holds the model: call "
            "cache.save(path), and SparseActivationCache.load(path, model). dict(cache.items()) can be pickled."
        )

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file: lazy patterns as q, k, layout and log-sum-exp. The model is left out.

        The file appears whole or not at all.

        Raises:
            TypeError: A pattern is of a kind that can't be stored.
            OSError: The file can't be written.
        """
        packer = Packer()
        description = {
            "activations": {name: packer.pack(tensor) for name, tensor in self.cache_dict.items()},
            "config": self.config.to_json(),
            "has_batch_dim": self.has_batch_dim,
            "of": self.of,
            "next_tokens": None if self.next_tokens is None else [packer.pack(part) for part in self.next_tokens],
        }
        path = Path(path)
        part = path.with_name(path.name + ".part")
        try:
            save_file(packer.tensors, part, metadata={_FORMAT: json.dumps(description)})
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> SparseActivationCache:
        """Read what `save` wrote.

        Args:
            path: The file.
            model: The model of the run, for the methods of ActivationCache that need it.

        Raises:
            ValueError: Not a file that `save` wrote.
            OSError: The file can't be read.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _FORMAT not in metadata:
                raise ValueError(f"{str(path)!r} holds no SparseActivationCache; expected a file that save() wrote.")
        tensors = load_file(path)
        description = json.loads(metadata[_FORMAT])
        config, fallbacks = StreamConfig.from_json(description["config"]), Counter[str]()
        unpacker = Unpacker(tensors, config, fallbacks)
        activations = {name: unpacker.unpack(entry) for name, entry in description["activations"].items()}
        known = description["next_tokens"]
        return cls(
            activations,
            model,
            description["has_batch_dim"],
            config=config,
            fallbacks=fallbacks,
            next_tokens=None if known is None else NextTokens(*map(unpacker.unpack, known)),
            of=description.get("of"),  # earlier files don't say it
        )

    def __repr__(self) -> str:
        pruned = f", {self._pruned_by_kind()}" if self.patterns else ""
        forward = f", forward={self.config.forward!r}"
        of = "" if self.of is None else f"; of {self.of}"
        return f"SparseActivationCache({len(self.cache_dict)} activations, {self.nbytes:,} bytes{pruned}{forward}{of})"


def _kind(window: int | None, layouts: list[BlockLayout | JoinedLayout]) -> str:
    """How many layers of one kind, and what was pruned of the pairs that they may read."""
    number = f"{len(layouts)} {'full layer' if window is None else 'layer'}{'s' if len(layouts) > 1 else ''}"
    kind = "" if window is None else f" with a window of {window:,}"
    return f"{number}{kind}: {Pairs.of(layouts).pruned:.4f}"
