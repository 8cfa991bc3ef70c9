"""`torch.einsum` and `@` with sparse tensors.

`einsum` takes these steps, until an ordinary einsum is left:

1. An ordinary operand that shares the key (or the query) letter of a sparse one, which is summed over, is contracted with it
   by a product of matrices. So two patterns and a vector are two products. Of several sparse operands, one whose keys (or
   queries) no other has is summed over those.
2. Sparse operands that share query and key are multiplied entry by entry with whatever has only their letters, and summed;
   where they differ in other letters (two patterns' heads, each with each), for one index of those after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_letters
from typing import Any

import torch

from tl_stream.tensors.slicing import at
from tl_stream.tensors.wrapper import SparseTensor

Operand = tuple[Any, str]  # a tensor and the letters of its dimensions


def matmul(a: Any, b: Any) -> Any:
    """`a @ b`, one of them sparse; of two, only of heads that are flattened (each with each)."""
    if isinstance(a, SparseTensor) and isinstance(b, SparseTensor):
        return _of_flattened(a, b)
    if isinstance(b, SparseTensor):
        row = a.dim() == 1
        result = matmul(b.mT, (a[None] if row else a).mT)
        return result if result is NotImplemented else result.mT.squeeze(-2) if row else result.mT
    if b.dim() == 1:
        result = matmul(a, b[:, None])
        return result if result is NotImplemented else result.squeeze(-1)
    return a.product(b, transposed=False)


def _of_flattened(a: SparseTensor, b: SparseTensor) -> Any:
    """`heads.flatten(1) @ heads.flatten(1).T`; NotImplemented for any other product of two sparse tensors."""
    if a.dim() != 2 or b.dim() != 2 or {1} != a.row_and_key_dims() or {0} != b.row_and_key_dims():
        return NotImplemented
    rows_and_keys = a.own_shape[-2:]
    return einsum("hqk,gqk->hg", a.reshape(-1, *rows_and_keys), b.T.reshape(-1, *rows_and_keys))


def einsum(equation: str, *operands: Any) -> Any:
    """See the module. NotImplemented where that does not do."""
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    letters, output = _letters(equation, operands)
    return _einsum(list(zip(operands, letters, strict=True)), output)


def _einsum(operands: list[Operand], output: str) -> Any:
    """Step by step, until no operand is sparse."""
    sparse = [i for i, (x, _) in enumerate(operands) if isinstance(x, SparseTensor)]
    if not sparse:
        return torch.einsum(f"{','.join(letters for _, letters in operands)}->{output}", *(x for x, _ in operands))
    for i in sparse:
        tensor, own = operands[i]
        if own[-2:-1] == own[-1:]:
            return _einsum(_replaced(operands, i, (tensor.diagonal(0, -2, -1), own[:-1])), output)
        if len(set(own)) != len(own):
            return NotImplemented
        laid_out = tensor.in_own_order(own)
        if laid_out is None:
            before = [letter for d, letter in enumerate(own) if d not in tensor.row_and_key_dims()]
            return _one_by_one(operands, before[0], output) if before else NotImplemented
        operands = _replaced(operands, i, laid_out)
    for i in sparse:
        step = _step(operands, i, output, alone=len(sparse) == 1)
        if step is not None:
            return step if step is NotImplemented else _einsum(step, output)
    first = operands[sparse[0]]
    if any(operands[i][1][-2:] != first[1][-2:] for i in sparse):
        return NotImplemented
    spread = [letter for i in sparse for letter in operands[i][1] if any(letter not in operands[j][1] for j in sparse)]
    if not spread:
        return _multiply(first, [operand for operand in operands if operand is not first], output)
    return _one_by_one(operands, spread[0], output)


def _replaced(operands: list[Operand], i: int, operand: Operand) -> list[Operand]:
    return [*operands[:i], operand, *operands[i + 1 :]]


def _step(operands: list[Operand], i: int, output: str, alone: bool) -> Any:
    """The operands with sparse operand i summed over its keys (or queries), in a product with an ordinary one or by itself.

    None where neither is due; where it is `alone`, `_multiply` sums it.
    """
    tensor, own = operands[i]
    for summed, other in ((own[-1], own[-2]), (own[-2], own[-1])):
        sharing = [j for j, (_, letters) in enumerate(operands) if j != i and summed in letters]
        if summed in output or len(sharing) > 1 or (alone and not sharing):
            continue
        if not sharing:
            return _replaced(operands, i, (tensor.sum(own.index(summed)), own.replace(summed, "")))
        x, letters = operands[sharing[0]]
        if isinstance(x, SparseTensor) or other in letters:
            continue
        found = _contract((tensor, own), (x, letters), transposed=summed == own[-2])
        left = [operand for j, operand in enumerate(operands) if j not in (i, sharing[0])]
        return found if found is NotImplemented else [found, *left]
    return None


def _contract(sparse: Operand, operand: Operand, transposed: bool) -> Any:
    """A product of matrices over the key (or query) letter."""
    (tensor, own), (x, letters) = sparse, operand
    summed, left = (own[-2], own[-1]) if transposed else (own[-1], own[-2])
    extra = [letter for letter in letters if letter not in own]
    matrix = _broadcastable(x, letters, own[:-2] + summed + "".join(extra))
    matrix = matrix.flatten(len(own) - 1) if extra else matrix.unsqueeze(-1)
    result = tensor.product(matrix, transposed)
    if result is NotImplemented:
        return result
    result = result.unflatten(-1, [x.shape[letters.index(letter)] for letter in extra]) if extra else result.squeeze(-1)
    return result, own[:-2] + left + "".join(extra)


def _one_by_one(operands: list[Operand], letter: str, output: str) -> Any:
    """For each index of a letter that some sparse operands lack, as in `hqk,gqk->hg`; then stacked, or summed."""
    size = next(x.shape[letters.index(letter)] for x, letters in operands if letter in letters)
    results = []
    for i in range(size):
        taken = [
            (at(x, letters.index(letter), i), letters.replace(letter, "")) if letter in letters else (x, letters)
            for x, letters in operands
        ]
        results.append(_einsum(taken, output.replace(letter, "")))
        if results[-1] is NotImplemented or isinstance(results[-1], SparseTensor):
            return NotImplemented
    return torch.stack(results, output.index(letter)) if letter in output else sum(results[1:], results[0])


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
