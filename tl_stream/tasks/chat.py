"""Tasks as a chat model is asked them: the question in the user's turn, and the model's turn begun with the answer's prefix."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from typing import Any

from transformers import PreTrainedTokenizerBase

from tl_stream.tasks.spans import Span, TokenIndex
from tl_stream.tasks.task import Task

CORRECTIONS = 8


def chat_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """The tokenizer's chat template around a user's message, up to where the model's turn begins.

    Where both the template and the tokenizer put a BOS first, the text is without: `tokenizer(text)` has one.

    Raises ValueError where the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("tokenizer: got one without a chat template; expected that of a chat model, or no chat")
    turns = [{"role": "user", "content": message}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    bos = tokenizer.bos_token
    doubled = bos is not None and tokenizer(text)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    return text.removeprefix(str(bos)) if doubled else text


def in_chat(make: Callable[..., Task]) -> Callable[..., Task]:
    """Makes a task's texts as a chat: `in_chat(niah_single_2)(tokenizer, 4096, depth=0.5, seed=0)`.

    As in RULER (Hsieh et al. 2024, arXiv:2404.06654) the words that the answer completes are the first of the model's turn.
    The whole, with all that the template adds, has exactly `length` tokens, and spans are those of the whole.

    Raises ValueError (when called) where the tokenizer has no chat template or tells no characters of its tokens, where the
    template changes the text, where no text has this length, or as `make`.
    """

    @wraps(make)
    def made(tokenizer: PreTrainedTokenizerBase, length: int, **settings: Any) -> Task:
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer: got a slow one ({type(tokenizer).__name__}); expected a fast one, for its offsets")
        room = length - len(tokenizer(chat_prompt(tokenizer, "a"))["input_ids"])
        for _ in range(CORRECTIONS):
            task = _in_turns(tokenizer, make(tokenizer, room, **settings))
            if task.length == length:
                return task
            room += length - task.length
        raise ValueError(f"length: found no chat of exactly {length} tokens with this tokenizer; try another")

    return made


def _in_turns(tokenizer: PreTrainedTokenizerBase, task: Task) -> Task:
    offsets = tokenizer(task.prompt, return_offsets_mapping=True)["offset_mapping"]
    cut = _first_letter(task.prompt, offsets[task.answer_prefix.start][0])
    message, prefix = task.prompt[:cut].rstrip(), task.prompt[cut:]
    text = chat_prompt(tokenizer, message)
    if message not in text:
        raise ValueError(
            "tokenizer: got a chat template that changes the message's text; expected one that repeats it as it is"
        )
    before, text = text.rindex(message), text + prefix
    index = TokenIndex(tokenizer, text)

    def moved(character: int) -> int:
        return character + (before if character < cut else len(text) - len(task.prompt))

    def span(old: Span) -> Span:
        start = _first_letter(task.prompt, offsets[old.start][0])
        return index.span(moved(start), moved(offsets[old.stop - 1][1] - 1) + 1)

    changes: dict[str, Any] = {}
    for field in fields(task):
        value = getattr(task, field.name)
        if isinstance(value, Span):
            changes[field.name] = span(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Span):
            changes[field.name] = tuple(span(each) for each in value)
    return replace(task, **changes, prompt=text, length=len(index.ids))


def _first_letter(text: str, start: int) -> int:
    """The first character from `start` on that is no space; a token's may begin with the one before its word."""
    return start + len(text[start:]) - len(text[start:].lstrip())
