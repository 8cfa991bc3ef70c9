"""Measures what the bundled model can do, with dense attention: `python -m tl_stream.models.evaluate --json FILE`.

Task seeds count up from 0; training draws its own from 2**32 on (`curriculum.TRAINING_SEEDS`), so no text was seen.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from tl_stream.models.loading import DEFAULT, load, load_tokenizer
from tl_stream.tasks import NeedleTask, ReasoningTask, TrackingTask, niah, reasoning_trace, variable_tracking

NEEDLE_LENGTHS = (512, 1024, 2048, 4096, 8192)
TRACKING_LENGTHS = (512, 1024, 2048, 4096)
TRACE_SENTENCES = (50, 100, 200)
DEPTHS = 11
TOKENS_AT_ONCE = 32768


@dataclass(frozen=True)
class Figure:
    """The mean score of one task at one size, with a Wilson 95 % interval.

    The interval takes each text for one trial. For scores that are shares (variables named, values derived) that is
    conservative: their variance is at most that of a coin with the same mean.
    """

    task: str
    size: str
    texts: int
    mean: float
    low: float
    high: float


def figure(task: str, size: str, scores: list[float]) -> Figure:
    """Mean of scores in 0..1 and its interval."""
    mean = sum(scores) / len(scores)
    low, high = wilson(mean, len(scores))
    return Figure(task, size, len(scores), mean, low, high)


def wilson(share: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson 1927); z = 1.96 gives 95 %."""
    scale = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    spread = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2)) / scale
    return max(0.0, centre - spread), min(1.0, centre + spread)


def generate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int) -> list[str]:
    """Greedy continuations of prompts that all have the same number of tokens."""
    tokens = tokenizer(prompts, return_tensors="pt")

    output = model.generate(  # type: ignore[misc]  # its self type is a protocol that no model class satisfies
        tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(output[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def generated_scores(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[NeedleTask | TrackingTask],
    new_tokens: int,
) -> list[float]:
    """The score of each task's greedy answer."""
    size = max(1, TOKENS_AT_ONCE // tasks[0].length)
    scores = []
    for start in tqdm(range(0, len(tasks), size), leave=False):
        chunk = tasks[start : start + size]
        outputs = generate(model, tokenizer, [task.prompt for task in chunk], new_tokens)
        scores += [task.score(output) for task, output in zip(chunk, outputs, strict=True)]
    return scores


def derived_positions(task: ReasoningTask) -> list[int]:
    """The token positions of all derived values, the answer included."""
    return [s.value_span.start for s in task.sentences if s.antecedents and s.value_span]


def forced_score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: ReasoningTask) -> float:
    """The share of derived values that the model predicts from the true text before each."""
    tokens = tokenizer(task.text, return_tensors="pt")["input_ids"][0]
    positions = torch.tensor(derived_positions(task))
    predicted = model(tokens[None]).logits[0, positions - 1].argmax(-1)
    return (predicted == tokens[positions]).float().mean().item()


def free_score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: ReasoningTask) -> float:
    """The share of derived values right when the text holds the values that the model itself derived before."""
    tokens = tokenizer(task.text, return_tensors="pt")["input_ids"]
    cache, start, right = None, 0, 0
    positions = derived_positions(task)
    truth = tokens[0, positions].tolist()
    for position, value in zip(positions, truth, strict=True):
        step = model(tokens[:, start:position], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, start = step.past_key_values, position
        tokens[0, position] = step.logits[0, -1].argmax()
        right += int(tokens[0, position] == value)
    return right / len(positions)


@torch.inference_mode()
def figures(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: int) -> Iterator[Figure]:
    """All figures of the model's note, on at least `texts` texts each."""
    per_depth = math.ceil(texts / DEPTHS)
    for name, keys in (("niah_single_1", 1), ("niah_multikey_1", 4)):
        for length in NEEDLE_LENGTHS:
            needles = [
                niah(tokenizer, length, depth=row / (DEPTHS - 1), keys=keys, seed=row * per_depth + column)
                for row in range(DEPTHS)
                for column in range(per_depth)
            ]
            yield figure(name, f"{length} tokens", generated_scores(model, tokenizer, needles, 8))
    for length in TRACKING_LENGTHS:
        chains = [variable_tracking(tokenizer, length, seed=seed) for seed in range(texts)]
        yield figure("variable tracking", f"{length} tokens", generated_scores(model, tokenizer, chains, 8))
    for count in TRACE_SENTENCES:
        traces = [reasoning_trace(tokenizer, count, seed=seed) for seed in range(texts)]
        for name, score in (("reasoning, true text", forced_score), ("reasoning, free-running", free_score)):
            yield figure(name, f"{count} sentences", [score(model, tokenizer, t) for t in tqdm(traces, leave=False)])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default=DEFAULT, help="a bundled model or a checkpoint folder")
    parser.add_argument("--texts", type=int, default=200, help="texts per figure, at least")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    results = []
    for result in figures(load(arguments.name, host="hf"), load_tokenizer(arguments.name), arguments.texts):
        results.append(result)
        tqdm.write(
            f"{result.task:24} {result.size:14} {result.texts:4} texts  "
            f"{result.mean:.4f}  [{result.low:.4f}, {result.high:.4f}]"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
