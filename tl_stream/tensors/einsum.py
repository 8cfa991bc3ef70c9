"""`torch.einsum` and `@` with a sparse tensor.

`einsum` goes about it thus:

1. An ordinary operand that shares the key (or the query) letter, which is summed over, is contracted by a product of matrices;
   an ordinary einsum with the other operands follows.
2. Else operands that have only the sparse one's letters are multiplied into it, entry by entry, and it is summed.
"""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_letters
from typing import Any

import torch

from tl_stream.tensors.wrapper import SparseTensor

Operand = tuple[Any, str]  # a tensor and the letters of its dimensions


def matmul(a: Any, b: Any) -> Any:
    """`a @ b`, one of them sparse; NotImplemented where both are."""
    if isinstance(a, SparseTensor) and isinstance(b, SparseTensor):
        return NotImplemented
    if isinstance(b, SparseTensor):
        row = a.dim() == 1
        result = matmul(b.mT, (a[None] if row else a).mT)
        return result if result is NotImplemented else result.mT.squeeze(-2) if row else result.mT
    if b.dim() == 1:
        result = matmul(a, b[:, None])
        return result if result is NotImplemented else result.squeeze(-1)
    return a.product(b, transposed=False)


def einsum(equation: str, *operands: Any) -> Any:
    """See the module. NotImplemented where that does not do."""
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    letters, output = _letters(equation, operands)
    found = list(zip(operands, letters, strict=True))
    first = next(i for i, (x, _) in enumerate(found) if isinstance(x, SparseTensor))
    tensor, own = found.pop(first)
    if own[-2:-1] == own[-1:]:
        found.append((tensor.diagonal(0, -2, -1), own[:-1]))
        return torch.einsum(f"{','.join(letters for _, letters in found)}->{output}", *(x for x, _ in found))
    laid_out = tensor.in_own_order(own)
    if laid_out is None or len(set(own)) != len(own):
        return NotImplemented
    tensor, own = laid_out
    query, key = own[-2:]
    for summed, other in ((key, query), (query, key)):
        sharing = [operand for operand in found if summed in operand[1]]
        is_product = len(sharing) == 1 and summed not in output and other not in sharing[0][1]
        if is_product and not any(isinstance(x, SparseTensor) for x, _ in found):
            rest = [operand for operand in found if operand is not sharing[0]]
            return _contract((tensor, own), sharing[0], rest, output, transposed=summed == query)
    return _multiply((tensor, own), found, output)


def _contract(sparse: Operand, operand: Operand, rest: list[Operand], output: str, transposed: bool) -> Any:
    """A product of matrices over the key (or query) letter, then an ordinary einsum."""
    (tensor, own), (x, letters) = sparse, operand
    summed, left = (own[-2], own[-1]) if transposed else (own[-1], own[-2])
    extra = [letter for letter in letters if letter not in own]
    matrix = _broadcastable(x, letters, own[:-2] + summed + "".join(extra))
    matrix = matrix.flatten(len(own) - 1) if extra else matrix.unsqueeze(-1)
    result = tensor.product(matrix, transposed)
    if result is NotImplemented:
        return result
    result = result.unflatten(-1, [x.shape[letters.index(letter)] for letter in extra]) if extra else result.squeeze(-1)
    inputs = [own[:-2] + left + "".join(extra), *(letters for _, letters in rest)]
    return torch.einsum(f"{','.join(inputs)}->{output}", result, *(x for x, _ in rest))


def _multiply(sparse: Operand, others: list[Operand], output: str) -> Any:
    """Entry by entry, then summed over the letters that aren't in the output."""
    tensor, own = sparse
    for x, letters in others:
        if not set(letters) <= set(own) or len(set(letters)) != len(letters):
            return NotImplemented
        tensor = tensor * _broadcastable(x, letters, own)
    summed = [d for d, letter in enumerate(own) if letter not in output]
    kept = [letter for letter in own if letter in output]
    result = tensor.sum(summed) if summed else tensor
    return result.permute([kept.index(letter) for letter in output]) if kept else result


def _broadcastable(x: Any, letters: str, target: str) -> Any:
    """`x` in the order of `target`, with size 1 for the letters that it doesn't have."""
    x = x.permute([letters.index(letter) for letter in target if letter in letters])
    missing = [letter not in letters for letter in target]
    return x[tuple(None if new else slice(None) for new in missing)] if any(missing) else x


def _letters(equation: str, operands: tuple[Any, ...]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, with spare letters for what `...` stands for."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    spare = [letter for letter in ascii_letters if letter not in equation]
    spelled, dots = [], ""
    for letters, x in zip(left.split(","), operands, strict=True):
        hidden = "".join(spare[: x.dim() - len(letters) + 3][::-1]) if "..." in letters else ""
        dots = max(dots, hidden, key=len)
        spelled.append(letters.replace("...", hidden))
    if not arrow:
        every = "".join(spelled)
        output = "..." + "".join(sorted(letter for letter in set(every) - set(dots) if every.count(letter) == 1))
    return spelled, output.replace("...", dots)


HANDLERS: dict[str, Callable[..., Any]] = {
    "einsum": einsum, "matmul": matmul, "rmatmul": lambda b, a: matmul(a, b), "bmm": matmul, "mm": matmul, "mv": matmul,
}  # fmt: skip
