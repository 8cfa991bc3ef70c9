"""The bundled model: one checkpoint, three hosts, and it does what its note says."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from tl_stream.hosts import model_classes
from tl_stream.models import checkpoint, load, load_tokenizer
from tl_stream.models.curriculum import TRAINING_SEEDS, Curriculum
from tl_stream.models.decoder import Decoder
from tl_stream.models.evaluate import (
    derived_positions,
    forced_score,
    free_score,
    generated_scores,
    wilson,
)
from tl_stream.models.tokenizer import build_tokenizer
from tl_stream.models.train import STAGES
from tl_stream.tasks import niah, reasoning_trace, variable_tracking

needs_hooked = pytest.mark.skipif(
    "hooked_transformer" not in model_classes().values(), reason="transformer-lens 4 has no HookedTransformer"
)
TEXT = "The grass is green. One of the special magic numbers for otter is: 4071923. Mia has 7 marbles."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return load(host="hf")


@pytest.mark.parametrize("host", [pytest.param("hooked", marks=needs_hooked), "bridge"])
def test_hosts_agree_on_tokens_and_logits(host: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    hosted: Any = load(host=host)
    expected_ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert torch.equal(hosted.to_tokens(TEXT), expected_ids)
    assert (expected_ids == tokenizer.bos_token_id).nonzero().tolist() == [[0, 0]]
    with torch.inference_mode():
        torch.testing.assert_close(hosted(TEXT), model(expected_ids).logits, atol=1e-4, rtol=0)
    assert hosted.cfg.n_ctx == model.config.max_position_embeddings
    assert not hosted.training
    assert not model.training


@needs_hooked
def test_hooked_generates_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    hooked = load(host="hooked")
    task = niah(tokenizer, 512, depth=0.25, keys=4, seed=11)
    output = hooked.generate(task.prompt, max_new_tokens=8, do_sample=False, verbose=False)
    assert str(output).removeprefix(task.prompt).strip().startswith(task.answer)


@pytest.mark.parametrize("host", [pytest.param("hooked", marks=needs_hooked), "bridge", "hf"])
def test_dtype_is_as_asked(host: str) -> None:
    hosted = load(host=host, dtype=torch.float64)
    assert {parameter.dtype for parameter in hosted.parameters()} == {torch.float64}


def test_decoding_gives_the_text_back(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == ["<s>", "▁The", "▁grass"]


def test_the_shipped_tokenizer_is_the_one_the_code_builds(tokenizer: PreTrainedTokenizerBase) -> None:
    built = build_tokenizer(tokenizer.model_max_length)
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_pads_at_the_right_with_a_token_of_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokenizer(["On we walk.", "On"], padding=True)
    assert batch["input_ids"][1][2:] == [tokenizer.pad_token_id] * 3
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)


def test_the_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in checkpoint.find("mini").iterdir()) < 10_000_000


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint.find("mini"), tmp_path / "copy"))


def test_a_copied_folder_loads(copied: Path, model: LlamaForCausalLM) -> None:
    loaded = load(copied, host="hf")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_damaged_file_is_named(copied: Path) -> None:
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}"):
        load(copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: expected SHA-256 [0-9a-f]{64}, found no file"):
        load_tokenizer(copied)


def test_unknown_names_and_hosts_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"name: 'maxi' is neither a bundled model \(mini\) nor a folder"):
        load("maxi")
    with pytest.raises(ValueError, match="host: got 'jax'; expected 'hooked', 'bridge' or 'hf'"):
        load(host="jax")


@needs_hooked
def test_hooked_says_what_to_do_without_hooked_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformer_lens.HookedTransformer", raising=False)
    monkeypatch.setitem(sys.modules, "transformer_lens.HookedTransformer", None)
    with pytest.raises(ImportError, match="use host='bridge'"):
        load(host="hooked")


@torch.inference_mode()
@pytest.mark.parametrize("keys", [1, 4])
def test_finds_needles_in_1024_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, keys: int) -> None:
    tasks = [niah(tokenizer, 1024, depth=depth, keys=keys, seed=900) for depth in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert sum(generated_scores(model, tokenizer, tasks, 8)) >= 5


@torch.inference_mode()
def test_tracks_variables(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    tasks = [variable_tracking(tokenizer, 512, seed=seed) for seed in range(900, 908)]
    assert sum(generated_scores(model, tokenizer, tasks, 8)) >= 7


@torch.inference_mode()
def test_derives_values(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    tasks = [reasoning_trace(tokenizer, 50, seed=seed) for seed in range(900, 904)]
    assert sum(forced_score(model, tokenizer, task) for task in tasks) >= 0.9 * len(tasks)
    assert 0.0 <= free_score(model, tokenizer, tasks[0]) <= forced_score(model, tokenizer, tasks[0]) + 0.1


def test_derived_positions_hold_the_derived_values(tokenizer: PreTrainedTokenizerBase) -> None:
    task = reasoning_trace(tokenizer, 20, seed=1)
    ids = tokenizer(task.text)["input_ids"]
    derived = [s for s in task.sentences if s.kind in ("derivation", "answer")]
    assert [tokenizer.decode([ids[position]]) for position in derived_positions(task)] == [s.value for s in derived]


def test_wilson_interval_of_known_cases() -> None:
    assert wilson(1.0, 200) == pytest.approx((0.98116, 1.0), abs=1e-5)
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)


def test_the_training_network_is_llama(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    decoder = Decoder(model.config)
    decoder.load_state_dict(model.state_dict())
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = decoder(ids, torch.arange(ids.shape[1])[None])
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_training_batches_weigh_what_the_tasks_ask_for(stage, tokenizer: PreTrainedTokenizerBase) -> None:
    curriculum = Curriculum(tokenizer, 16384, seed=3)
    batch = curriculum.batch(stage.mixture, 2000)
    assert batch.ids.shape == batch.positions.shape == batch.weights.shape
    is_padding = batch.ids == tokenizer.pad_token_id
    assert torch.equal(batch.weights > 0, ~is_padding)
    steps = batch.positions.diff(dim=1)[~is_padding[:, 1:]]
    assert steps.min() >= 1
    assert batch.positions.max() < 16384
    again = Curriculum(tokenizer, 16384, seed=3).batch(stage.mixture, 2000)
    assert torch.equal(again.ids, batch.ids)
    assert torch.equal(again.positions, batch.positions)


def test_answers_carry_the_weight(tokenizer: PreTrainedTokenizerBase) -> None:
    curriculum = Curriculum(tokenizer, 16384, seed=4)
    for kind in (curriculum.needle, curriculum.tracking, curriculum.reasoning):
        ids, answers = kind(256)
        words = tokenizer.decode([ids[position] for position, _ in answers])
        assert words, kind
        if kind == curriculum.needle:
            assert len(answers) % 8 == 0
            assert all(ids[end] == curriculum.stop_id for end, _ in answers[7::8])
            assert all(tokenizer.decode([ids[start - 1]]) == ":" for start, _ in answers[::8])


def test_training_seeds_leave_the_small_ones_alone() -> None:
    assert TRAINING_SEEDS.start == 2**32
