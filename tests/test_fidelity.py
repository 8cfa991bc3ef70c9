"""The fidelity report against dense patterns: every figure recomputed from the T x T tensors of small models."""

from __future__ import annotations

import json
from typing import Any, cast

import families
import pytest
import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity
from zoo import NEEDS_HOOKED, build, left_padded, tokens

import tl_stream
from tl_stream import StreamConfig
from tl_stream.fidelity import HeadFidelity
from tl_stream.fidelity.streamed import ENTRIES
from tl_stream.hosts import unembedding

CONFIG = StreamConfig(block_q=8, block_k=8, k=2, beam=1, max_dense=0)
LENGTH = 61


def expected_head(dense: Any, cache: Any, layer: int, head: int, rows: Tensor) -> dict[str, float]:
    """A head's figures from dense tensors; loops, as the definitions say."""
    full, pruned = dense["pattern", layer][:, head], cache["pattern", layer].to_dense()[:, head]
    kept = cache.block_layout(layer).to_dense()[:, head]
    retained = 1 - (full * ~kept).sum(-1)[:, rows]
    entry, block, top_kept, top_same = [], [], [], []
    for text in range(len(full)):
        for row in rows.tolist():
            ranked = full[text, row, : row + 1].argsort(descending=True)
            ranked = ranked[full[text, row, ranked] > 0]
            entry.append(kept[text, row, ranked[:ENTRIES]].double().mean())
            top_kept.append(float(kept[text, row, ranked[0]]))
            top_same.append(float(ranked[0] == pruned[text, row].argmax()))
        for first in rows[rows % 8 == 0].tolist():
            mass = full[text, first : first + 8].sum(0).split(8)
            order = torch.tensor([part.sum() for part in mass]).argsort(descending=True)
            chosen = cache.block_layout(layer).to_block_dense()[text, head, first // 8]
            wanted = [i for i in order.tolist() if mass[i].sum() > 0][: int(chosen.sum())]
            block.append(sum(bool(chosen[i]) for i in wanted) / len(wanted))
    heads = dense["pattern", layer].shape[1]
    z, z_pruned = (x["z", layer].flatten(2).unflatten(-1, (heads, -1))[:, rows, head] for x in (dense, cache))
    return {
        "retained_mean": float(retained.mean()),
        "retained_5th": float(torch.quantile(retained.double(), 0.05)),
        "retained_least": float(retained.min()),
        "block_recall": sum(block) / len(block),
        "entry_recall": float(torch.stack(entry).mean()),
        "top_kept": sum(top_kept) / len(top_kept),
        "top_same": sum(top_same) / len(top_same),
        "pattern_cosine": float(cosine_similarity(full, pruned, dim=-1, eps=torch.finfo(full.dtype).tiny)[:, rows].mean()),
        "output_cosine": float(cosine_similarity(z, z_pruned, dim=-1).mean()),
    }


def check(model: Any, text: Tensor, tolerance: float, rows: int | None = None, **kwargs: Any) -> Any:
    result = tl_stream.fidelity(model, text, CONFIG, new_tokens=0, rows=rows)
    _, dense = model.run_with_cache(text)
    _, cache = model.run_with_sparse_cache(text, config=CONFIG)
    shown = torch.arange(LENGTH) if rows is None else kwargs["expected_rows"]
    for head in result.heads:
        for name, value in expected_head(dense, cache, head.layer, head.head, shown).items():
            assert getattr(head, name) == pytest.approx(value, abs=tolerance), (head.layer, head.head, name)
    for layer in result.layers:
        similar = cosine_similarity(dense["resid_post", layer.layer], cache["resid_post", layer.layer], dim=-1)
        assert layer.prompt_mean == pytest.approx(float(similar.mean()), abs=tolerance)
        assert layer.prompt_least == pytest.approx(float(similar.min()), abs=tolerance)
    assert min(head.retained_mean for head in result.heads) < 0.95
    return result


@pytest.mark.parametrize("variant", ["standard", "gqa", "local", "sinks", "alibi"])
@torch.no_grad()
def test_heads_and_layers_equal_dense_figures(variant: str) -> None:
    check(build(variant), tokens(LENGTH), 1e-9)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPT-OSS", "DeepSeek V3"])
@torch.no_grad()
def test_families_on_the_bridge(family: str) -> None:
    check(families.build(family), families.tokens(LENGTH), 1e-4)


@torch.no_grad()
def test_some_rows() -> None:
    """16 rows: two blocks of 8, evenly spaced, the last one (of 5 rows) among them."""
    result = check(build(), tokens(LENGTH), 1e-9, rows=16, expected_rows=torch.tensor([*range(24, 32), *range(56, 61)]))
    assert result.rows == 13


@torch.no_grad()
def test_the_output() -> None:
    model, text = build(), tokens(LENGTH)
    result = tl_stream.fidelity(model, text, CONFIG, new_tokens=0).output
    p, q = (x.log_softmax(-1) for x in (model(text), model.run_with_sparse_cache(text, config=CONFIG)[0]))
    kl = (p.exp() * (p - q)).sum(-1)
    assert result.kl_mean == pytest.approx(float(kl.mean()))
    assert result.kl_greatest == pytest.approx(float(kl.max()))
    assert result.kl_last == pytest.approx(float(kl[:, -1].mean()))
    assert result.top_1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    for found, logs in ((result.loss_dense, p), (result.loss_sparse, q)):
        assert found == pytest.approx(float(-logs[:, :-1].gather(-1, text[:, 1:, None]).mean()))
    assert result.next_n is None
    assert result.kl_mean > 0.01


@pytest.mark.parametrize("family", ["Gemma 2", "Cohere"])
@torch.no_grad()
def test_logits_are_made_some_positions_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model's own code makes them, with a soft cap or a factor, though a user's hook counts on the text's positions."""
    model, text = families.build(family), families.tokens(LENGTH)

    def cut(resid: Tensor, hook: Any) -> Tensor:
        resid[:, LENGTH - 5] = 0
        return resid

    model.add_hook("blocks.1.hook_resid_pre", cut)
    p, q = (x.log_softmax(-1) for x in (model(text), model.run_with_sparse_cache(text, config=CONFIG)[0]))
    monkeypatch.setattr(unembedding, "ENTRIES", 14 * model.cfg.d_vocab)
    shapes = []
    with model.unembed.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1])):
        result = tl_stream.fidelity(model, text, CONFIG, new_tokens=0).output
    assert max(shapes) == 7
    assert result.kl_mean == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert result.top_1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert torch.equal(model(text).log_softmax(-1), p)


@torch.no_grad()
def test_a_hook_on_the_logits_sees_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = families.build("Llama"), families.tokens(LENGTH)
    monkeypatch.setattr(unembedding, "ENTRIES", 14 * model.cfg.d_vocab)
    result = tl_stream.fidelity(model, text, CONFIG, new_tokens=0).output
    seen: list[int] = []
    model.add_hook("unembed.hook_out", lambda x, hook: seen.append(x.shape[1]))
    assert tl_stream.fidelity(model, text, CONFIG, new_tokens=0).output == result
    assert {*seen} == {LENGTH}


@torch.no_grad()
def test_along_generated_text() -> None:
    """Free steps are those of generate, forced ones those of one pass over the dense continuation."""
    model, text, steps = build(), tokens(40), 6
    result = tl_stream.fidelity(model, text, CONFIG, new_tokens=steps)
    options = {"max_new_tokens": steps, "do_sample": False, "stop_at_eos": False, "verbose": False}
    dense = model.generate(text, use_past_kv_cache=False, **options)
    with tl_stream.sparse(model, CONFIG):
        sparse = model.generate(text, **options)
    agree = (dense[:, 40:] == sparse[:, 40:]).cumprod(-1).double().mean()
    assert result.output.next_n == pytest.approx(float(agree))
    assert agree < 1
    _, read = model.run_with_cache(dense[:, :-1])
    _, forced = model.run_with_sparse_cache(dense[:, :-1], config=CONFIG)
    for layer in result.layers:
        expected = cosine_similarity(read["resid_post", layer.layer], forced["resid_post", layer.layer], dim=-1)[:, 39:].mean(0)
        assert torch.allclose(torch.tensor(layer.forced), expected.float(), atol=1e-6)
        assert len(layer.generated) == steps
    last = result.layers[-1]
    assert min(last.generated[1:]) < last.generated[0]  # it falls once the texts have parted


@torch.no_grad()
def test_nothing_pruned_is_the_dense_model() -> None:
    result = tl_stream.fidelity(build(), tokens(LENGTH), StreamConfig(k=100, max_dense=0), new_tokens=4)
    assert result.pruned == 0
    assert result.output.next_n == result.output.top_1 == 1
    assert result.output.kl_greatest < 1e-9
    for head in result.heads:
        figures = [
            getattr(head, name) for name in HeadFidelity.__dataclass_fields__ if name not in ("layer", "head", "worst_row")
        ]
        assert figures == pytest.approx([1.0] * len(figures))
    for layer in result.layers:
        assert [layer.prompt_least, *layer.generated, *layer.forced] == pytest.approx([1.0] * 9)


@NEEDS_HOOKED
@torch.no_grad()
def test_padding_is_left_out() -> None:
    """A text padded on the left by whole blocks has the figures of the text alone."""
    model, text = build("rotary"), tokens(40, batch=1)
    config = StreamConfig(block_q=8, block_k=8, k=2, estimator="exact", max_dense=0)
    padded, mask = left_padded(text, 8)
    a = tl_stream.fidelity(model, text, config, new_tokens=0)
    b = tl_stream.fidelity(model, padded, config, new_tokens=0, attention_mask=mask)
    for x, y in zip(a.heads, b.heads, strict=True):
        assert x.retained_mean == pytest.approx(y.retained_mean)
        assert x.entry_recall == pytest.approx(y.entry_recall)
        assert x.output_cosine == pytest.approx(y.output_cosine)
        assert x.worst_row + 8 == y.worst_row
    assert a.output.kl_mean == pytest.approx(b.output.kl_mean)
    assert a.output.loss_sparse == pytest.approx(b.output.loss_sparse)


@torch.no_grad()
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = build("local"), tokens(LENGTH)
    whole = tl_stream.fidelity(model, text, CONFIG, new_tokens=0)
    monkeypatch.setattr("tl_stream.audit.rows.CHUNK_ENTRIES", 1)
    parts = tl_stream.fidelity(model, text, CONFIG, new_tokens=0)
    for x, y in zip(whole.heads, parts.heads, strict=True):
        assert list(vars(x).values()) == pytest.approx(list(vars(y).values()))


@torch.no_grad()
def test_shown_as_table_frame_and_json() -> None:
    result = tl_stream.fidelity(build(), tokens(LENGTH), CONFIG, new_tokens=2)
    heads, layers, _ = cast("list[Table]", result.table().renderables)
    assert heads.row_count == len(result.to_dataframe()) == 12
    assert layers.row_count == 6
    plain = json.loads(result.to_json())
    assert plain["heads"][3]["retained_5th"] == result.heads[3].retained_5th
    assert plain["layers"][1]["forced"] == list(result.layers[1].forced)
    assert plain["output"]["next_n"] == result.output.next_n
    assert "KL" in repr(result)


@torch.no_grad()
def test_bad_arguments() -> None:
    model, text = build(), tokens(LENGTH)
    with pytest.raises(TypeError, match="config was a dict"):
        tl_stream.fidelity(model, text, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tokens was \(61,\); expected tokens \[batch, pos\]"):
        tl_stream.fidelity(model, text[0])
    with pytest.raises(TypeError, match="model was a Linear"):
        tl_stream.fidelity(torch.nn.Linear(1, 1), text)
    with pytest.raises(ValueError, match="rows was 0"):
        tl_stream.fidelity(model, text, rows=0)
    with pytest.raises(ValueError, match="new_tokens was 8 with an attention_mask"):
        tl_stream.fidelity(model, text, attention_mask=torch.ones_like(text))
    with pytest.raises(ValueError, match="text of 129 tokens; expected at most the 128 of n_ctx"):
        tl_stream.fidelity(model, tokens(122))
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


def test_the_function_and_the_package_share_a_name() -> None:
    import tl_stream.fidelity.streamed

    assert callable(tl_stream.fidelity)
    assert tl_stream.fidelity.__module__ == "tl_stream.fidelity.report"
