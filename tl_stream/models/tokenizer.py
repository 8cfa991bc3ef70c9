"""The bundled model's word-level tokenizer: one token a word, a digit or a punctuation mark."""

import re

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tl_stream.tasks import filler, needle, reasoning, tracking, vocabulary

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PIECE = r"▁?[A-Za-z]+|▁?[0-9]|▁?[^A-Za-z0-9▁]|▁"


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer whose vocabulary is every word that the tasks can write.

    Pieces keep the space before them (as a leading "▁"), so that decoding gives the text back letter for letter;
    the digits of a number are separate tokens. BOS is prepended by the tokenizer itself, whoever calls it.
    """
    splitter = Sequence([Metaspace(prepend_scheme="always", split=False), Split(Regex(PIECE), "isolated")])
    words = dict.fromkeys([*SPECIAL.values(), *"0123456789", *(f"▁{digit}" for digit in range(10))])
    for line in _task_texts():
        words.update(dict.fromkeys(piece for piece, _ in splitter.pre_tokenize_str(line)))
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = MetaspaceDecoder(prepend_scheme="always")
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocab[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def _task_texts() -> list[str]:
    """Every fixed wording of the tasks, its placeholders taken out, and every word that can fill one."""
    wordings = [
        *(needle.INTRO, needle.NEEDLE, needle.QUESTION),
        *(tracking.INTRO, tracking.FIRST, tracking.HOP, tracking.QUESTION),
        *reasoning.SETUP,
        *reasoning.FACTS,
        *(wording for rule in reasoning.RULES for wording in rule.wordings),
        *reasoning.CONCLUSIONS,
        *reasoning.PLANS,
        *reasoning.CHECKS,
        *reasoning.FILLERS,
        reasoning.ANSWER,
        *(*vocabulary.NOISE, filler.STRETCH, filler.STRETCH_WORD),
    ]
    fixed = [re.sub(r"\{\w*\}", "", wording) for wording in wordings]
    return [*fixed, *vocabulary.KEYS, *vocabulary.NAMES, *vocabulary.VARIABLES]
