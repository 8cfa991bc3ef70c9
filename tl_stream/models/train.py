"""Trains the bundled model on a CPU: `python -m tl_stream.models.train --out DIR --seed 0`.

1. Random tokens, repeated once: induction, without which the model learns to copy a number but never which.
2. Short texts of all tasks. Positions jump ahead between sentences, so that the rotary embedding meets the distances
   of long texts at the price of short ones.
3. Texts of their real lengths, so that attention learns not to be diluted by all the noise in between; easy traces first.
4. The same with the hardest traces, down to a low learning rate.
5. Most of all needles, so that no digit is mixed up.
"""

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tl_stream.models.checkpoint import write_checksums
from tl_stream.models.curriculum import HARD_RULES, Batch, Curriculum, Mixture
from tl_stream.models.decoder import Decoder
from tl_stream.models.tokenizer import build_tokenizer

MAX_POSITIONS = 16384
ROTARY_BASE = 1e7
"""With the usual 10^4, heads of 32 hardly have a dimension slow enough to match content over thousands of positions."""
LONG = (256, 256, 256, 512, 512, 512, 1024, 1024, 2048, 2048, 4096)
KINDS = ("induction", "recall", "needle", "tracking", "reasoning")


M = TypeVar("M")


@dataclass(frozen=True)
class Stage(Generic[M]):
    """Some steps on one mixture of about `tokens` tokens each; the learning rate goes from `start` to `end`.

    It follows half a cosine, after `warmup` steps in which it rises from 0.
    """

    name: str
    steps: int
    tokens: int
    start: float
    end: float
    mixture: M
    warmup: int = 0


STAGES = (
    Stage("induction", 700, 6144, 2e-3, 2e-3, Mixture(1.0, 0.0, 0.0, 0.0, 0.0, (96,), 0.3), warmup=100),
    Stage("short", 500, 6144, 2e-3, 1.8e-3, Mixture(0.1, 0.05, 0.45, 0.15, 0.25, (128, 160, 192, 256), 0.4)),
    Stage("long", 1200, 8192, 1.5e-3, 1.2e-3, Mixture(0.02, 0.0, 0.33, 0.15, 0.5, LONG, 0.6), warmup=50),
    Stage("hard", 1350, 8192, 1.2e-3, 1e-5, Mixture(0.02, 0.0, 0.25, 0.15, 0.58, LONG, 0.6, HARD_RULES), warmup=50),
    Stage("polish", 250, 8192, 6e-4, 5e-6, Mixture(0.02, 0.0, 0.5, 0.1, 0.38, LONG, 0.7, HARD_RULES), warmup=30),
)


def model_config(
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int = 128,
    intermediate_size: int = 384,
    head_dim: int = 32,
    max_positions: int = MAX_POSITIONS,
    rotary_base: float = ROTARY_BASE,
) -> LlamaConfig:
    """Four layers of four heads over two key-value heads; of these sizes, a million parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": rotary_base},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def loss_of(model: Decoder, batch: Batch) -> torch.Tensor:
    """Weighted mean cross-entropy of the next token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.ids, batch.positions)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def answer_accuracy(model: Decoder, batch: Batch) -> float:
    """The share of answer tokens predicted right, given the text before each."""
    right = model(batch.ids, batch.positions)[:, :-1].argmax(-1) == batch.ids[:, 1:]
    is_answer = batch.weights[:, 1:] > 0.06
    return right[is_answer].float().mean().item()


def progress(model: Decoder, tokenizer: PreTrainedTokenizerBase, mixture: Mixture) -> str:
    """Answer accuracy of each task on fresh texts of 256 tokens or, once longer ones are trained, 2,048."""
    curriculum = Curriculum(tokenizer, MAX_POSITIONS, seed=1)
    figures = []
    for kind in KINDS:
        only: dict[str, Any] = dict.fromkeys(KINDS, 0.0) | {kind: 1.0}
        probe = replace(mixture, lengths=(min(2048, max(256, *mixture.lengths)),), contiguous=1.0, **only)
        figures.append(f"{kind} {answer_accuracy(model, curriculum.batch(probe, 8192)):.3f}")
    return ", ".join(figures)


def save(model: Decoder, tokenizer: PreTrainedTokenizerBase, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes an ordinary Hugging Face checkpoint folder, with checksums."""
    exported = LlamaForCausalLM(model.config)
    exported.load_state_dict(model.state_dict())
    torch.nn.Module.to(exported, dtype)
    exported.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_checksums(out)


def learning_rate(stage: Stage[Any], step: int) -> float:
    """The rate at a step of a stage."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / stage.steps)
    return (stage.end + (stage.start - stage.end) * cosine) * min(1.0, (step + 1) / max(1, stage.warmup))


def take_step(model: Decoder, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """One step of training, gradients clipped to norm 1; the loss before it."""
    loss = loss_of(model, batch)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(out: Path, seed: int) -> None:
    """Runs all stages; says how it goes, and saves, every 250 steps."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(MAX_POSITIONS)
    model = Decoder(model_config(tokenizer))
    curriculum = Curriculum(tokenizer, MAX_POSITIONS, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    for stage in STAGES:
        for step in (bar := tqdm(range(stage.steps), desc=stage.name, mininterval=10)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(stage, step)
            loss = take_step(model, optimizer, curriculum.batch(stage.mixture, stage.tokens))
            if (step + 1) % 250 == 0 or step + 1 == stage.steps:
                report = progress(model, tokenizer, stage.mixture)
                bar.write(f"{stage.name} {step + 1}: loss {loss:.3f}, {report}")
                save(model, tokenizer, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tl_stream_model"), help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
