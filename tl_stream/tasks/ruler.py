"""RULER's tasks by their names (Hsieh et al. 2024, arXiv:2404.06654, appendix B): what `niah` and others do with its settings.

All prompts have exactly `length` tokens of the given tokenizer. `depth` is as in `niah`; RULER itself draws it. `haystack`,
too; None is what RULER has: for essays, noise where a tokenizer can't write those (the bundled one).
"""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from tl_stream.tasks.filler import essays_for
from tl_stream.tasks.frequency import cwe, fwe
from tl_stream.tasks.needle import NeedleTask, niah
from tl_stream.tasks.task import Task
from tl_stream.tasks.text import Depth
from tl_stream.tasks.tracking import vt


def niah_single_1(
    tokenizer: PreTrainedTokenizerBase, length: int, *, depth: Depth = 0.5, haystack: str = "noise", seed: int = 0
) -> NeedleTask:
    """One needle in noise: word -> number."""
    return niah(tokenizer, length, depth=depth, haystack=haystack, seed=seed)


def niah_single_2(
    tokenizer: PreTrainedTokenizerBase, length: int, *, depth: Depth = 0.5, haystack: str | None = None, seed: int = 0
) -> NeedleTask:
    """One needle in essays: word -> number."""
    return niah(tokenizer, length, depth=depth, haystack=haystack or essays_for(tokenizer), seed=seed)


def niah_single_3(
    tokenizer: PreTrainedTokenizerBase, length: int, *, depth: Depth = 0.5, haystack: str | None = None, seed: int = 0
) -> NeedleTask:
    """One needle in essays: word -> uuid."""
    return niah(tokenizer, length, depth=depth, haystack=haystack or essays_for(tokenizer), value_kind="uuids", seed=seed)


def niah_multikey_1(
    tokenizer: PreTrainedTokenizerBase, length: int, *, depth: Depth = 0.5, haystack: str | None = None, seed: int = 0
) -> NeedleTask:
    """Four needles with different keys in essays, one of them asked for: word -> number."""
    return niah(tokenizer, length, depth=depth, keys=4, haystack=haystack or essays_for(tokenizer), seed=seed)


def niah_multikey_2(tokenizer: PreTrainedTokenizerBase, length: int, *, depth: Depth = 0.5, seed: int = 0) -> NeedleTask:
    """One needle among needles: word -> number."""
    return niah(tokenizer, length, depth=depth, haystack="needles", seed=seed)


def niah_multikey_3(tokenizer: PreTrainedTokenizerBase, length: int, *, depth: Depth = 0.5, seed: int = 0) -> NeedleTask:
    """One needle among needles: uuid -> uuid."""
    return niah(tokenizer, length, depth=depth, haystack="needles", key_kind="uuids", value_kind="uuids", seed=seed)


def niah_multivalue(
    tokenizer: PreTrainedTokenizerBase, length: int, *, depth: Depth = None, haystack: str | None = None, seed: int = 0
) -> NeedleTask:
    """One key with four numbers in essays, all asked for."""
    return niah(tokenizer, length, depth=depth, values=4, haystack=haystack or essays_for(tokenizer), seed=seed)


def niah_multiquery(
    tokenizer: PreTrainedTokenizerBase, length: int, *, depth: Depth = None, haystack: str | None = None, seed: int = 0
) -> NeedleTask:
    """Four keys with a number each in essays, all asked for."""
    return niah(tokenizer, length, depth=depth, keys=4, queries=4, haystack=haystack or essays_for(tokenizer), seed=seed)


RULER: dict[str, Callable[..., Task]] = {
    make.__name__: make
    for make in (
        *(niah_single_1, niah_single_2, niah_single_3),
        *(niah_multikey_1, niah_multikey_2, niah_multikey_3),
        *(niah_multivalue, niah_multiquery, vt, cwe, fwe),
    )
}
"""The tasks by name: `RULER["vt"](tokenizer, 4096, seed=3)`."""
