"""A model by its name or from a folder, and what the studies ask of it: its chat template, its context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

import tl_stream
from tl_stream.tasks import Task, chat_prompt


class InputError(ValueError):
    """Something that was asked for can't be done; the message says what to ask for instead."""


def load(name: str, device: str, dtype: torch.dtype) -> Any:
    """A TransformerBridge in evaluation mode, with its tokenizer.

    Args:
        name: A name on Hugging Face (its weights are fetched where they aren't there yet), or a folder that
            `save_pretrained` wrote a model and a tokenizer to.
        device: Where the weights go.
        dtype: What they are converted to.

    Raises:
        InputError: No such folder, one that holds no model, a name that gives none, or a model that can't be traced.
    """
    folder = Path(name).expanduser()
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        _check_folder(folder)
        name = str(folder)
    try:
        model = TransformerBridge.boot_transformers(name, device=device, dtype=dtype).eval()
    except OSError as error:
        raise InputError(
            f"--model was {name!r}, which gave no model: {str(error).strip().splitlines()[0]} Expected a folder, or a name on "
            "Hugging Face that you may read (some ask you to accept their terms and to log in)."
        ) from error
    support = tl_stream.supports(model)
    if not support:
        raise InputError(f"--model was {name!r}, which can't be traced: {support}")
    return model


def _check_folder(folder: Path) -> None:
    wanted = {"a config.json": "config.json", "weights": "*.safetensors", "a tokenizer": "tokenizer*"}
    if not folder.is_dir():
        raise InputError(f"--model was {str(folder)!r}, which is no folder; expected one with a model, or a Hugging Face name.")
    lacking = [what for what, pattern in wanted.items() if not any(folder.glob(pattern))]
    if lacking:
        raise InputError(
            f"--model was {str(folder)!r}, a folder without {' and '.join(lacking)}; expected one that save_pretrained wrote "
            "a model and its tokenizer to."
        )


def asked(model: Any, message: str) -> str:
    """A user's message in the tokenizer's chat template, or as it is where there is none."""
    return chat_prompt(model.tokenizer, message) if model.tokenizer.chat_template else f"{message}\n"


def tokens_of(model: Any, text: str) -> torch.Tensor:
    """`[1, pos]`, as the tokenizer gives them: BOS where it puts one."""
    return torch.tensor([model.tokenizer(text)["input_ids"]], device=next(model.parameters()).device)


def with_answer(model: Any, task: Task) -> tuple[torch.Tensor, int]:
    """A task's prompt and its answer, `[1, pos]`, and how many tokens are the answer's, without a space before it."""
    encoded = model.tokenizer(f"{task.prompt} {task.answer}", return_offsets_mapping=True)
    first = len(task.prompt) + 1
    tokens = torch.tensor([encoded["input_ids"]], device=next(model.parameters()).device)
    return tokens, sum(stop > first for _, stop in encoded["offset_mapping"])


def up_to_answer(model: Any, task: Task) -> torch.Tensor:
    """The same up to where the answer's first token is next, `[1, pos]`."""
    tokens, n_answer = with_answer(model, task)
    return tokens[:, :-n_answer]


def check_context(model: Any, what: str, tokens: int) -> None:
    """Raises InputError where a text has more tokens than the model reads."""
    if tokens > model.cfg.n_ctx:
        raise InputError(
            f"{what} was {tokens} tokens, more than the {model.cfg.n_ctx} that the model reads; expected at most that."
        )
