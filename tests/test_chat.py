"""Tasks as chats: exact lengths, the same spans, one BOS, and the answer's prefix in the model's turn."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import tokenizers_zoo
from paper_studies import dry_run
from transformers import PreTrainedTokenizerBase

from tl_stream.tasks import Span, chat_prompt, in_chat, niah_multiquery, niah_single_1, niah_single_2, vt

TOKENIZERS = {"Gemma": dry_run.gemma_tokenizer, "R1": dry_run.qwen_tokenizer}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("make", [niah_single_1, niah_single_2, niah_multiquery, vt], ids=lambda make: make.__name__)
def test_a_chat_has_the_length_and_the_spans_say_what_they_said(make: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    task = in_chat(make)(tokenizer, 700, seed=3)
    ids = tokenizer(task.prompt)["input_ids"]
    assert len(ids) == task.length == 700
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id

    def said(span: Span) -> str:
        return str(tokenizer.decode(ids[span.slice])).strip()

    assert said(task.answer_prefix) == task.prompt.rpartition("\n")[2].strip()
    assert said(task.question).endswith(said(task.answer_prefix))
    assert task.question.stop == task.answer_prefix.stop == 700
    if make is vt:
        assert all(said(needle).startswith("VAR") for needle in task.needles)
        return
    for needle, value, reference in zip(task.needles, task.values, task.references, strict=True):  # type: ignore[attr-defined]
        assert said(needle).startswith("One of the special magic numbers for")
        assert said(needle).rstrip(".").endswith(reference)
        assert said(value).rstrip(".") == reference


def test_the_question_stands_in_the_users_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    task = in_chat(niah_single_1)(tokenizer, 400, depth=0.2, seed=1)
    frame = chat_prompt(tokenizer, "@")
    before, after = frame.split("@")
    assert task.prompt.startswith(before + "Some special magic numbers")
    middle = task.prompt.index(after)
    assert task.prompt[:middle].endswith("in the text above?")
    assert task.prompt[middle + len(after) :].startswith("One of the special magic numbers for ")
    assert in_chat(niah_single_1).__name__ == "niah_single_1"


def test_what_cannot_be_a_chat_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="one without a chat template"):
        in_chat(niah_single_1)(tokenizers_zoo.byte_pairs(600), 300)
    slow = tokenizers_zoo.SlowCharacters()
    with pytest.raises(ValueError, match="got a slow one"):
        in_chat(niah_single_1)(slow, 3000)
    shouting = deepcopy(tokenizer)
    shouting.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match="changes the message's text"):
        in_chat(niah_single_1)(shouting, 400)
    with pytest.raises(ValueError, match="tokens are too few"):
        in_chat(niah_single_1)(tokenizer, 60)
