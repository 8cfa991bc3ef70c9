"""What every host puts before a model's own hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Int
from torch import Tensor
from torch.nn import Module
from transformer_lens.hook_points import HookPoint

from tl_stream.hosts.arguments import check_length
from tl_stream.hosts.overrides import Overrides, standing
from tl_stream.tensors.backward_hooks import watch
from tl_stream.tensors.block_sparse import BlockSparseTensor
from tl_stream.tensors.joined import JoinedTensor
from tl_stream.tensors.scores import AttentionScores
from tl_stream.tensors.wrapper import Wrapper


def first_hook(overrides: Overrides, point: HookPoint, hook: Callable[[Any, HookPoint], Any]) -> None:
    """`hook` changes what enters `point` meanwhile, before all of TransformerLens's hooks; `reset_hooks()` leaves it."""
    overrides.entry(point, lambda args, kwargs: ((hook(args[0], point),), kwargs))


def stream(scores: Tensor, hook: Any) -> Tensor:
    """The Stream hook. Anything but fresh scores passes: a context inside another one has already chosen."""
    if not isinstance(scores, AttentionScores):
        return watch_gradient(scores, hook)
    sparse = scores.to_sparse_scores()
    sparse.origin.pairs.add(sparse.block_layout)
    return watch_gradient(sparse, hook)


def watch_gradient(tensor: Tensor, hook: Any) -> Tensor:
    """Let the backward hooks of a hook point see the gradient of a sparse tensor."""
    if isinstance(tensor, BlockSparseTensor | JoinedTensor):
        watch(tensor, hook)
    return tensor


def complete(before: Tensor, after: Any, hook: Any) -> Any:
    """What a hook point hands to the model: what came out of it.

    Under `forward="exact"` that is the record, as hooks left it, and what lies outside it.

    Args:
        before: What entered the hook point: `AttentionScores` or a sparse pattern.
        after: What came out.
        hook: The hook point.

    Raises:
        NotImplementedError: A hook returned an ordinary tensor, which can't say what lies outside the record, or computed one
            from the record that can't say it either.
    """
    if not isinstance(before, AttentionScores | BlockSparseTensor) or not before.origin.is_exact:
        return after
    if not isinstance(after, BlockSparseTensor):
        raise NotImplementedError(
            f"A hook on {hook.name} returned a {type(after).__name__}; under forward='exact' expected the sparse tensor that "
            "it was given, edited: an ordinary one says nothing of what was not recorded. Edit it in place (x[...] = value), "
            "or use forward='sparse'."
        )
    data = after._data.fork()
    data.is_complete = True
    if data.outside is not None or not data.knows_outside:
        data.rest, data.outside = data.find_rest(), None
        if data.rest is None and not data.layout.is_full:
            raise NotImplementedError(
                f"A hook on {hook.name} computed its result from what was recorded of layer {data.origin.layer}; what became "
                "of the rest isn't known, and with forward='exact' the model reads it. Multiply by numbers, or by tensors with "
                "one number a row (scores may be shifted by them, too), assign x[...] = number, or use forward='sparse'."
            )
    return type(after)(data, after._view, after.dtype, after._detached)


def call_complete(point: HookPoint, original: Callable[..., Any], x: Tensor) -> Any:
    """`point(x)`, completed."""
    return complete(x, original(x), point)


def never_dense(overrides: Overrides, block: Module, hook_attn_scores: HookPoint, layer: int) -> None:
    """Raise NotImplementedError where `block` ran and no scores of ours came by: it took its attention elsewhere, densely."""
    seen: list[bool] = []  # for each call in progress: a hook may run the model, too

    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if seen and isinstance(args[0], Wrapper):
            seen[-1] = True
        return args, kwargs

    def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(False)
        try:
            output = original(*args, **kwargs)
            if not seen[-1]:
                raise NotImplementedError(
                    f"Layer {layer} ran without the attention that {hook_attn_scores.name} shows: a forward of its own, or "
                    "another module, stands in its place and would stay dense. Restore TransformerLens's own."
                )
            return output
        finally:
            seen.pop()

    overrides.entry(hook_attn_scores, note)
    overrides.method(block, "_call_impl", call)


def to_all_tokens(model: Any, input: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`to_tokens` without truncation: a text that is too long raises."""
    if len(args) < 4:
        kwargs.setdefault("truncate", False)
    tokens = standing(model, "to_tokens")(input, *args, **kwargs)
    check_length(tokens, model.cfg.n_ctx)
    return tokens


def as_prompt(model: Any, tokens: Any) -> Int[Tensor, "batch pos"]:
    """Text or tokens `[pos]` or `[batch, pos]` as tokens `[batch, pos]`.

    Raises:
        TypeError: Neither.
        ValueError: No tokens.
    """
    if isinstance(tokens, str):
        tokens = to_all_tokens(model, tokens)
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dim() not in (1, 2):
        found = f"of shape {tuple(tokens.shape)} and {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens was {found}; expected integers [batch, pos] or [pos], or text.")
    if not tokens.numel():
        raise ValueError(f"tokens were of shape {tuple(tokens.shape)}; expected at least one token.")
    return tokens if tokens.dim() == 2 else tokens[None]
