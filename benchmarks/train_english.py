"""Trains the English model on a CPU: `python benchmarks/train_english.py --out DIR --packages DIR --seed 0`.

It starts with the beginnings of an induction head (see english/circuit.py).

1. Repeated passages and repeated random tokens mostly, a fifth plain text: the head becomes useful, and general.
2. Mostly short windows of text. Positions jump ahead between paragraphs, so that the rotary embedding meets the
   distances of long texts at the price of short ones.
3. Windows of up to 4,096 tokens, down to a low learning rate.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from english.batches import Drawer, Mixture
from english.circuit import start_induction
from english.corpus import training_texts
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tl_stream.models.decoder import Decoder
from tl_stream.models.train import Stage, learning_rate, loss_of, model_config, save, take_step

VOCABULARY = 4096
MAX_POSITIONS = 131072
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


@dataclass(frozen=True)
class CarefulStage(Stage[Mixture]):
    """A stage in which the learning rate of the first two layers' attention is `caution` times that of the rest.

    Text alone would undo the induction head before the model can make use of it.
    """

    caution: float = 1.0


SHORT = (192, 256, 320)
LONG = (256, 256, 512, 512, 1024, 1024, 2048, 4096)
STAGES = (
    CarefulStage("induction", 80, 4096, 1e-3, 1e-3, Mixture(0.2, 0.4, 0.4, (128,), 0.3), warmup=60),
    CarefulStage("short", 4000, 4096, 1.5e-3, 3e-4, Mixture(0.75, 0.15, 0.1, SHORT, 0.4), warmup=20, caution=0.3),
    CarefulStage("long", 300, 8192, 3e-4, 1e-5, Mixture(0.75, 0.15, 0.1, LONG, 0.6), warmup=5, caution=0.3),
)


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the training texts; the tokenizer prepends BOS itself."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL["bos_token"]
    special = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, clean_up_tokenization_spaces=False, **SPECIAL
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Decoder:
    """An untrained decoder of five million parameters, with tied embeddings and the beginnings of an induction head."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64}
    model = Decoder(model_config(tokenizer, **sizes, max_positions=MAX_POSITIONS, rotary_base=1e6))
    model.lm_head.weight = model.model.embed_tokens.weight
    start_induction(model)
    return model


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[int]:
    """All texts, one after another, with EOS between them."""
    encodings = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [token for ids in encodings for token in (*ids, tokenizer.eos_token_id)]


def parameter_groups(model: Decoder) -> list[dict[str, Any]]:
    """All other parameters, and those of the attention of the first two layers."""
    layers: Any = model.model.layers
    circuit = [layer.self_attn for layer in layers[:2]]
    careful = {weight: None for attention in circuit for weight in attention.parameters()}
    others = [weight for weight in model.parameters() if weight not in careful]
    return [{"params": others}, {"params": list(careful)}]


@torch.no_grad()
def progress(model: Decoder, drawer: Drawer) -> str:
    """Loss on each kind of sample of 1,024 tokens: text, repeated passages, second copies of random tokens."""
    kinds = {"text": (1.0, 0.0, 0.0), "repeats": (0.0, 1.0, 0.0), "random": (0.0, 0.0, 1.0)}
    losses = {kind: loss_of(model, drawer.batch(Mixture(*shares, (1024,), 1.0), 2048)) for kind, shares in kinds.items()}
    return ", ".join(f"{kind} {loss.item():.3f}" for kind, loss in losses.items())


def train(out: Path, packages: Path, seed: int, first: str) -> None:
    """Runs all stages from `first` on; says how it goes, and saves, every 100 steps."""
    torch.manual_seed(seed)
    texts = training_texts(packages)
    tokenizer = build_tokenizer(texts)
    stream = token_stream(tokenizer, texts)
    print(f"{len(texts)} texts, {sum(map(len, texts)):,} characters, {len(stream):,} tokens")
    model = build_model(tokenizer)
    stages = STAGES[[stage.name for stage in STAGES].index(first) :]
    if stages != STAGES:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict())
    drawer = Drawer(tokenizer, stream, MAX_POSITIONS, seed)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    for stage in stages:
        for step in (bar := tqdm(range(stage.steps), desc=stage.name, mininterval=10)):
            for group, factor in zip(optimizer.param_groups, (1.0, stage.caution), strict=True):
                group["lr"] = factor * learning_rate(stage, step)
            loss = take_step(model, optimizer, drawer.batch(stage.mixture, stage.tokens))
            if (step + 1) % 100 == 0 or step + 1 == stage.steps:
                report = progress(model, Drawer(tokenizer, stream, MAX_POSITIONS, seed=1))
                bar.write(f"{stage.name} {step + 1}: loss {loss:.3f}; {report}")
                save(model, tokenizer, out, torch.bfloat16)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--packages", type=Path, default=Path("build/english"), help="where the Debian packages are, or go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first", choices=[stage.name for stage in STAGES], default=STAGES[0].name, help="stage to go on with from --out"
    )
    arguments = parser.parse_args()
    train(arguments.out, arguments.packages, arguments.seed, arguments.first)


if __name__ == "__main__":
    main()
