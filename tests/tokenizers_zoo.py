"""Small tokenizers of the common kinds, trained here: byte-level pairs, pieces with an EOS, single characters, a slow one."""

from __future__ import annotations

import string
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tl_stream.tasks.filler import essays


@cache
def byte_pairs(size: int) -> PreTrainedTokenizerBase:
    """In the manner of GPT-2, without BOS; a `size` of 257 merges nothing."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(essays(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>")


@cache
def pieces() -> PreTrainedTokenizerBase:
    """In the manner of sentencepiece, with BOS and EOS."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=800,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=list(string.printable),
        show_progress=False,
    )
    tokenizer.train_from_iterator(essays(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def words(text: str) -> PreTrainedTokenizerBase:
    """A word a token, and no others than those of the text."""
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    found = dict.fromkeys(["<unk>", *string.digits, *(piece for piece, _ in splitter.pre_tokenize_str(text))])
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(found)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitter, pre_tokenizers.Digits(individual_digits=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


class SlowCharacters(PreTrainedTokenizer):
    """A character a token, and no offsets."""

    def __init__(self) -> None:
        self.characters = ["<s>", *string.printable]
        super().__init__(bos_token="<s>", unk_token="<s>")

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def get_vocab(self) -> dict[str, int]:
        return {character: index for index, character in enumerate(self.characters)}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.characters.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.characters[index]

    def build_inputs_with_special_tokens(self, ids: list[int], pair: list[int] | None = None) -> list[int]:
        return [0, *ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)
