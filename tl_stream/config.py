"""What Stream keeps and how it decides: one frozen description of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from tl_stream import budget
from tl_stream.budget import Budget, as_budget

ESTIMATORS = ("auto", "dual", "exact", "stream", "hip", "box", "window", "random")
WITHOUT_SHARES = ("window", "random")
BACKENDS = ("gather", "reference")
DECODE = ("sparse", "exact")
FORWARD = ("sparse", "exact")


@dataclass(frozen=True)
class StreamConfig:
    """How attention is made sparse (Rosser et al. 2025, arXiv:2510.19875, section 3).

    Args:
        block_q: Queries that share one choice of key blocks, in tokens.
        block_k: Keys that are kept or dropped together, in tokens.
        k: Key blocks chosen for each query block and head: a number, or a `tl_stream.budget`: `Sqrt`, `Linear` (both by
            position), `TopP` (by row), `PerHead`. A `k` that covers every block is full attention. The key blocks in which the
            queries stand themselves are kept, too, where they are not among those: every query reads something.
        estimator: How the blocks are chosen. `"auto"`: `"exact"` for query blocks that may read up to `exact_below` keys,
            `"dual"` for the others. `"exact"`: the true best ones, O(T^2) time in O(T) memory. `"dual"`: tree refinement by
            two scores, then exact scores of the leaves and of what a few queries of the head read, O(T log T). `"stream"`: the
            paper's refinement, nodes scored by the mean of their keys; `"hip"`: by their centre key (arXiv:2406.09827);
            `"box"`: by the greatest score possible within their bounds (Quest, arXiv:2406.10774). `"window"`: the first block
            and the most recent ones (arXiv:2309.17453). `"random"`. Or a function `f(problem, query_pos) -> blocks, masses`
            (see `tl_stream.estimator.Problem`).
        exact_below: Number of readable keys up to which `"auto"` is exact.
        beam: Tree nodes that `"dual"` keeps a step, in multiples of `k`; so many key blocks, and `k` more that the head's
            queries have in common, are scored exactly.
        leaf_queries: How many queries of a block decide, by their exact scores, which of the remaining candidate blocks are
            kept (evenly spaced, the last one among them); None: all. Fewer are faster, and may miss what a single query reads.
        keep_sink: Choose the first key block in any case; it counts as one of the `k`.
        dense_layers: Layers left dense: the first n (an int), or the given layer indices (a tuple).
        dense_queries: The last so many query rows of each forward pass read everything that the mask allows, in every layer, in
            O(dense_queries T) time and memory: then what decides the next token is exact, given the rest. The other rows are
            as without. A step of generation is such a row. (In texts padded on the right, so many rows of the one with the most
            padding, and all later rows of the others.)
        layout_from: A cache of an earlier run, whose kept blocks this run keeps, too, instead of estimating its own: to
            compare or patch runs on the same blocks. The texts must be of one length.
        decode: What a step of generation (one query, earlier keys in a KV cache) reads: `"sparse"`, the `k` key blocks
            estimated for it, or `"exact"`, everything. Prefill, sparse steps and a run that reads all of the text again are one
            sparse model with `block_q=1`, under every `estimator` named here: a step chooses as its row does in the re-run
            (the queries that `"dual"` asks are kept with the context, O(log T) a layer). Not with larger query blocks, whose
            rows share a choice while a step chooses for itself; nor where steps read everything (`"exact"`, `dense_queries`),
            nor under an estimator of your own that goes by `query_pos`, which counts from the run's first query. With
            `block_q=1` a warning says where a KV cache doesn't hold what the context saw: it was filled elsewhere or by
            another text than the last one, or has dropped the keys outside a sliding window (Gemma, Mistral, GPT-OSS under
            transformers' default), which moves the borders of the key blocks.
        forward: What the model computes: `"sparse"`, attention over the kept blocks alone, or `"exact"`, full attention
            (streamed: linear memory, quadratic time), of which the kept blocks are a record, with their true probabilities.
            What this says of kept and dropped then means recorded and not recorded; `dense_layers` and `decode="exact"`
            record everything.
        backend: `"gather"` (plain torch, linear memory) or `"reference"` (dense mask; for checking, small inputs only).
        max_dense: Largest number of entries that an operation unknown to the sparse tensors may make dense on its own.
            0 switches that off: such an operation then always raises.
        compile: Run the hierarchical estimator through `torch.compile`.
        seed: Seed of whatever is random. Nothing is random without one.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range, or `dense_queries` was given with `forward="exact"`, which reads everything anyway.
    """

    block_q: int = 32
    block_k: int = 32
    k: int | Budget = 16
    estimator: str | Callable[..., Any] = "auto"
    exact_below: int = 4096
    beam: int = 6
    leaf_queries: int | None = None
    keep_sink: bool = False
    dense_layers: int | tuple[int, ...] = 0
    dense_queries: int = 0
    layout_from: Any = field(default=None, compare=False)
    decode: str = "sparse"
    forward: str = "sparse"
    backend: str = "gather"
    max_dense: int = 2**22
    compile: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k", "beam"):
            _check_int(name, getattr(self, name), minimum=1)
        for name in ("max_dense", "exact_below", "dense_queries"):
            _check_int(name, getattr(self, name), minimum=0)
        as_budget(self.k)
        if self.leaf_queries is not None:
            _check_int("leaf_queries", self.leaf_queries, minimum=1)
        if self.seed is not None:
            _check_int("seed", self.seed, minimum=0)
        for name in ("keep_sink", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} was {getattr(self, name)!r}; expected True or False.")
        if not callable(self.estimator):
            _check_choice("estimator", self.estimator, ESTIMATORS)
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("decode", self.decode, DECODE)
        _check_choice("forward", self.forward, FORWARD)
        if self.dense_queries and self.forward == "exact":
            raise ValueError(
                f"dense_queries was {self.dense_queries} with forward='exact', where every row reads everything; expected "
                "one of the two. Leave dense_queries out."
            )
        if self.layout_from is not None and not callable(getattr(self.layout_from, "block_layout", None)):
            raise TypeError(
                f"layout_from was a {type(self.layout_from).__name__}; expected a SparseActivationCache (of a run that cached "
                "hook_pattern), or None."
            )
        if self.estimator == "random" and self.seed is None:
            raise ValueError("seed was None with estimator='random'; expected an int >= 0. Pass seed=0, for example.")
        if self.estimator in WITHOUT_SHARES and self.budget.needs_shares:
            raise ValueError(
                f"k was {self.k!r} with estimator={self.estimator!r}, which reckons no shares of attention; expected a "
                "number of blocks, or a budget by position."
            )
        self._check_dense_layers()

    @property
    def budget(self) -> Budget:
        """`k` as a budget."""
        return as_budget(self.k)

    def changed(self) -> str:
        """The config by what it changes of the defaults: `StreamConfig(k=6)`."""
        names = (each.name for each in fields(self) if getattr(self, each.name) != each.default)
        return f"StreamConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def to_json(self) -> dict[str, Any]:
        """All fields as numbers, strings, lists and dicts; an own estimator and `layout_from` are left out."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        estimator = "auto" if callable(self.estimator) else self.estimator
        return {**plain, "k": budget.to_json(self.k), "estimator": estimator, "layout_from": None}

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> StreamConfig:
        """The config that `to_json` described.

        Settings that no longer exist are left out: what they did is in the stored layouts.
        """
        layers = settings["dense_layers"]
        dense_layers = layers if isinstance(layers, int) else tuple(layers)
        known = {each.name: settings[each.name] for each in fields(cls) if each.name in settings}
        return cls(**{**known, "k": budget.from_json(settings["k"]), "dense_layers": dense_layers})

    def dense_layer_indices(self, n_layers: int) -> frozenset[int]:
        """The layers left dense in a model of `n_layers` layers.

        Raises:
            ValueError: A layer index that the model does not have.
        """
        layers = frozenset(range(self.dense_layers) if isinstance(self.dense_layers, int) else self.dense_layers)
        if any(layer >= n_layers for layer in layers):
            raise ValueError(
                f"dense_layers was {self.dense_layers!r}, but the model has {n_layers} layers; expected at most "
                f"{n_layers} first layers (an int) or indices from 0 to {n_layers - 1} (a tuple)."
            )
        return layers

    def _check_dense_layers(self) -> None:
        if isinstance(self.dense_layers, tuple):
            for layer in self.dense_layers:
                _check_int("dense_layers", layer, minimum=0)
        else:
            _check_int("dense_layers", self.dense_layers, minimum=0)


def as_config(config: Any, name: str = "config") -> StreamConfig:
    """A config as it is, None as the defaults; errors call it `name`.

    Raises:
        TypeError: Anything else.
    """
    if config is None:
        return StreamConfig()
    if not isinstance(config, StreamConfig):
        raise TypeError(f"{name} was a {type(config).__name__}; expected a tl_stream.StreamConfig, or None for the defaults.")
    return config


def check_shares(config: StreamConfig, use: str) -> None:
    """Raise ValueError where the estimator reckons no shares of attention for some use."""
    if config.estimator in WITHOUT_SHARES:
        raise ValueError(
            f"config had estimator={config.estimator!r}, which reckons no shares of attention {use}; expected another one."
        )


def _check_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} was {value!r} of type {type(value).__name__}; expected an int >= {minimum}.")
    if value < minimum:
        raise ValueError(f"{name} was {value}; expected an int >= {minimum}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} was {value!r}; expected one of {', '.join(map(repr, choices))}.")
