"""The last query rows read everything: all numbers are those of the dense model masked with the layout, which says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from allocations import LargestTensor
from dense_reference import EditedAttention, masked
from test_exactness import assert_same_run
from test_gradients import assert_same_gradients
from torch import Tensor
from zoo import NEEDS_HOOKED, build, dense, gap, mask_hooks, tokens

import tl_stream
from tl_stream import SparseActivationCache, StreamConfig
from tl_stream.masking import AttentionMask

CONFIG = StreamConfig(block_q=8, block_k=8, k=2, beam=1, max_dense=0)
VARIANTS = ["standard", "gqa", "rotary", "soft-capped", "alibi", "local", "sinks", "qk-norm"]


def config(n: int, **changes: Any) -> StreamConfig:
    return replace(CONFIG, dense_queries=n, **changes)


def assert_is_the_masked_model(model: Any, run: Any, text: Tensor, **options: Any) -> None:
    with model.hooks(fwd_hooks=mask_hooks(run[1])):
        assert_same_run(model.run_with_cache(text, **options), run, 1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [5, 16, 19])
@torch.no_grad()
def test_equals_the_masked_dense_model(variant: str, n: int) -> None:
    model, text = build(variant), tokens()
    run = model.run_with_sparse_cache(text, config=config(n))
    _, without = model.run_with_sparse_cache(text, config=CONFIG)
    assert_is_the_masked_model(model, run, text)
    assert not run[1].fallbacks
    kept, before = run[1].block_layout(0).to_dense(), without.block_layout(0).to_dense()
    assert torch.equal(kept[:, :, :-n], before[:, :, :-n])
    window = 9 if variant == "local" else None
    allowed = AttentionMask.causal(61, window=window).allows(*torch.meshgrid(*map(torch.arange, (1, 61, 61)), indexing="ij"))
    assert torch.equal(kept[:, :, -n:], allowed[:, -n:].expand(2, 4, n, 61))
    layouts = [run[1].block_layout(layer) for layer in range(3)]
    assert all(layout.n_kept_pairs == int(layout.to_dense().sum()) for layout in layouts)
    assert run[1].pruned == pytest.approx(1 - sum(x.n_kept_pairs for x in layouts) / sum(x.n_pairs for x in layouts))
    assert 0 < run[1].pruned < without.pruned
    if window is None:
        assert torch.equal(layouts[0].to_block_dense() & blocks_of(allowed), blocks_of(kept))


def blocks_of(entries: Tensor) -> Tensor:
    """Which blocks of 8 x 8 hold any entry."""
    padded = torch.nn.functional.pad(entries, (0, -entries.shape[-1] % 8, 0, -entries.shape[-2] % 8))
    return padded.unflatten(-2, (-1, 8)).unflatten(-1, (-1, 8)).any(-1).any(-2)


@pytest.mark.parametrize("n", [1, 8, 60])
@torch.no_grad()
def test_any_number_of_rows(n: int) -> None:
    model, text = build(), tokens()
    run = model.run_with_sparse_cache(text, config=config(n))
    assert_is_the_masked_model(model, run, text)
    pattern = run[1]["pattern", 1]
    row = pattern[0, 2, -1]
    assert (row > 0).all()
    assert row.sum().item() == pytest.approx(1)
    assert (pattern.retained_mass()[..., -n:] == 1).all()
    assert (pattern[:, :, -n:].retained_mass() == 1).all()
    assert gap(pattern[0, 2, -n:], pattern.to_dense()[0, 2, -n:]) < 1e-12
    assert pattern.retained_mass().amin() < 0.9 or n == 60


@pytest.mark.parametrize("n", [61, 1000])
@torch.no_grad()
def test_as_many_rows_as_there_are(n: int) -> None:
    model, text = build(), tokens()
    run = model.run_with_sparse_cache(text, config=config(n))
    assert_is_the_masked_model(model, run, text)
    assert run[1].block_layout(1).is_full
    assert run[1].pruned == 0.0


@NEEDS_HOOKED
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["gqa", "local", "alibi", "sinks"])
@torch.no_grad()
def test_padded_batch(variant: str, side: str) -> None:
    model, text = build(variant), tokens()
    attention_mask = torch.ones_like(text)
    attention_mask[0, slice(0, 13) if side == "left" else slice(-13, None)] = 0
    run = model.run_with_sparse_cache(text, config=config(17), attention_mask=attention_mask)
    assert_is_the_masked_model(model, run, text, attention_mask=attention_mask)
    assert [answer.retained for answer in run[1].audit(rows=3).answers] == [pytest.approx((1.0,) * 3)] * 2


@pytest.mark.parametrize("changes", [{"dense_layers": (1,)}, {"backend": "reference"}, {"k": 1000}], ids=str)
@torch.no_grad()
def test_with_other_settings(changes: dict[str, Any]) -> None:
    model, text = build(), tokens()
    run = model.run_with_sparse_cache(text, config=config(11, **changes))
    assert_is_the_masked_model(model, run, text)
    assert run[1].block_layout(1).is_full == (changes.keys() != {"backend"})
    patterns = run[1].stack_activation("pattern")
    assert gap(patterns.mean(0), torch.stack([x.to_dense() for x in run[1].patterns.values()]).mean(0)) < 1e-12
    assert not run[1].fallbacks


@pytest.mark.parametrize("variant", ["gqa", "soft-capped", "alibi", "local", "sinks"])
def test_gradients(variant: str) -> None:
    assert_same_gradients(build(variant), tokens(), config(11))


@pytest.mark.parametrize("kind", ["pattern", "attn_scores"])
@pytest.mark.parametrize("last", [False, True], ids=["all logits", "last logits"])
def test_autograd_grad_to_a_cached_tensor(kind: str, last: bool) -> None:
    model, text = build(), tokens()
    logits, cache = model.run_with_sparse_cache(text, config=config(11))
    kept: list[Tensor] = []
    keep = (lambda name: name.endswith(f"hook_{kind}"), lambda tensor, hook: kept.append(tensor))
    reference = model.run_with_hooks(text, fwd_hooks=[*mask_hooks(cache), keep])
    losses = [x[:, -1 if last else 0 :].square().sum() for x in (reference, logits)]
    expected = torch.autograd.grad(losses[0], kept)
    found = torch.autograd.grad(losses[1], [cache[kind, layer] for layer in range(3)])
    for layer, (a, b) in enumerate(zip(expected, found, strict=True)):
        a = a * cache.block_layout(layer).to_dense()
        assert a.abs().max() > 1e-4
        assert gap(a, b) < 1e-10 * a.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", ["pattern", "attn_scores"])
def test_backward_hooks_see_all_rows_at_once(kind: str) -> None:
    model, text = build(), tokens()
    _, cache = model.run_with_sparse_cache(text, config=config(11))
    seen: list[Tensor] = []
    name = f"blocks.1.attn.hook_{kind}"

    def halve(grad: Any, hook: Any) -> Any:
        seen.append(dense(grad).clone())
        return grad * 0.5

    def register(tensor: Any, hook: Any) -> None:
        tensor.register_hook(lambda grad: halve(grad, hook))

    def gradient(before: Any, **hooks: Any) -> Tensor:
        model.zero_grad()
        with model.hooks(fwd_hooks=[*before, *hooks.get("fwd_hooks", [])], bwd_hooks=hooks.get("bwd_hooks", [])):
            model(text, return_type="loss").backward()
        return model.W_E.grad.clone()

    for hooks in ({"bwd_hooks": [(name, halve)]}, {"fwd_hooks": [(name, register)]}):
        with tl_stream.sparse(model, config(11)):
            found = gradient([], **hooks)
        assert gap(gradient(mask_hooks(cache), **hooks), found) < 1e-12
        assert len(seen) == 2
        assert gap(seen[0], seen[1] * cache.block_layout(1).to_dense()) < 1e-12
        seen.clear()


def _set(key: Any, value: Any) -> Callable[[Any, Any], Any]:
    def edit(x: Any, clean: Any) -> Any:
        x[key] = value(x, clean) if callable(value) else value
        return x

    return edit


EDITS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "a column hidden": ("attn_scores", _set((..., 40), -torch.inf)),
    "columns hidden from one head": ("attn_scores", _set((slice(None), 1, slice(None), slice(9, 12)), -torch.inf)),
    "listed columns": ("attn_scores", _set((..., [3, 9]), -torch.inf)),
    "scores scaled": ("attn_scores", lambda x, clean: x * 2),
    "a head off": ("pattern", _set((slice(None), 2), 0.0)),
    "a row off": ("pattern", _set((..., -1, slice(None)), 0.0)),
    "rows of both kinds": ("pattern", _set((..., slice(44, 57), slice(None)), lambda x, clean: x[..., 44:57, :] * 0.25)),
    "every third row": ("pattern", _set((..., slice(1, None, 3), slice(None)), 0.0)),
    "small entries off": ("pattern", lambda x, clean: x.masked_fill(x < 0.05, 0)),
    "small entries off in place": ("pattern", lambda x, clean: _set(x < 0.05, 0.0)(x, clean)),
    "halved in place": ("pattern", lambda x, clean: x.mul_(0.5)),
    "by row": ("pattern", lambda x, clean: x * torch.linspace(0, 1, 61, dtype=x.dtype)[:, None]),
    "only the diagonals": ("pattern", lambda x, clean: x.tril(-1).triu(-20)),
    "a head of another run": ("pattern", _set((slice(None), 1), lambda x, clean: clean[:, 1])),
    "rows of another run": ("pattern", _set((..., slice(48, 56), slice(None)), lambda x, clean: clean[..., 48:56, :])),
    "another run's": ("pattern", lambda x, clean: clean),
    "heads swapped": ("pattern", lambda x, clean: x[:, [1, 0, 2, 3]]),
}


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_edits_in_hooks(edit: str) -> None:
    model, text = build(), tokens()
    _, cache = model.run_with_sparse_cache(text, config=config(11))
    _, clean = model.run_with_sparse_cache(tokens(seed=1), config=config(11))
    kind, change = EDITS[edit]
    name = f"blocks.1.attn.hook_{kind}"
    with tl_stream.sparse(model, replace(CONFIG, layout_from=cache)) as trace:
        found = model.run_with_hooks(text, fwd_hooks=[(name, lambda x, hook: change(x, clean[name]))], stop_at_layer=2)
    expected = model.run_with_hooks(
        text,
        stop_at_layer=2,
        fwd_hooks=[*mask_hooks(cache)[:2], (name, lambda x, hook: change(x.clone(), clean[name].to_dense()))],
    )
    assert gap(expected, found) < 1e-10
    assert gap(expected, model.run_with_hooks(text, fwd_hooks=mask_hooks(cache)[:2], stop_at_layer=2)) > 1e-4
    assert not trace.fallbacks


@pytest.mark.parametrize("where", ["pattern", "attn_scores"])
@torch.no_grad()
def test_what_is_computed_of_a_cached_tensor(where: str) -> None:
    model, text = build(), tokens()
    _, cache = model.run_with_sparse_cache(text, config=config(11))
    x = cache[where, 1]
    full = x.to_dense()
    rows, keys = torch.arange(40, 61), torch.arange(21)
    computed: dict[str, Callable[[Any], Any]] = {
        "window": lambda p: p[0, :, 45:55, 3:9],
        "paired positions": lambda p: p[:, :, rows, keys],
        "diagonal": lambda p: p.diagonal(-3, -2, -1),
        "row maximum": lambda p: p.amax(-1),
        "most read": lambda p: p.argmax(-1),
        "best": lambda p: p.argmax(),
        "transposed": lambda p: p.mT[:, :, 5],
        "one head's last rows": lambda p: p[1, 2, -15:].topk(3).indices,
        "softmax": lambda p: p.softmax(-1) if where == "attn_scores" else p,
    }
    if where == "pattern":
        computed |= {
            "received": lambda p: p.sum(-2),
            "total": lambda p: p.mean(),
            "over heads": lambda p: p.var(1),
            "over all rows": lambda p: p.std(-2),
            "received by values": lambda p: torch.einsum("bhqk,bhqd->bkhd", p, cache["z", 1].transpose(1, 2)),
            "entries": lambda p: (p > 0.2).nonzero(),
            "of rows": lambda p: p.reshape(-1, *p.shape[-2:])[3, 44:56] * 2,
        }
    for name, f in computed.items():
        assert gap(f(full), f(x)) < 1e-12, name
    assert not cache.fallbacks


@pytest.mark.parametrize(("n", "m"), [(0, 11), (11, 0), (11, 19), (19, 11)])
@torch.no_grad()
def test_the_blocks_of_another_run(n: int, m: int) -> None:
    """Rows that read everything there do so here, and those that `dense_queries` names beside them."""
    model, text = build(), tokens()
    _, cache = model.run_with_sparse_cache(text, config=config(n))
    run = model.run_with_sparse_cache(tokens(seed=1), config=config(m, layout_from=cache))
    assert_is_the_masked_model(model, run, tokens(seed=1))
    both = run[1].block_layout(1).to_dense()
    theirs = cache.block_layout(1).to_dense()
    assert torch.equal(both[:, :, : 61 - m], theirs[:, :, : 61 - m])
    assert both[:, :, 61 - m :].sum() == 2 * 4 * sum(range(62 - m, 62))
    with pytest.raises(ValueError, match=r"layout_from held a layout of .* = \(2, 4, 61, 61\); expected \(2, 4, 40, 40\)"):
        model.run_with_sparse_cache(tokens(40), config=config(m, layout_from=cache))


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Any) -> None:
    model, text = build("sinks"), tokens()
    _, cache = model.run_with_sparse_cache(text, config=config(11))
    cache.save(tmp_path / "cache.safetensors")
    loaded = SparseActivationCache.load(tmp_path / "cache.safetensors")
    assert loaded.config == cache.config
    assert all(gap(cache[name], loaded[name]) == 0 for name in cache)
    assert loaded.pruned == cache.pruned
    assert StreamConfig.from_json(cache.config.to_json()) == cache.config


@torch.no_grad()
def test_the_audit_knows_the_dense_rows() -> None:
    model, text = build(), tokens()
    _, cache = model.run_with_sparse_cache(text, config=config(11))
    audit = cache.audit(rows=11, sample=100)
    for layer in range(3):
        pattern = cache["pattern", layer]
        mass = pattern.retained_mass()
        kept = (cache.exact_rows(layer, range(61)) * cache.block_layout(layer).to_dense()).sum(-1)
        assert gap(mass, kept) < 1e-10
        for head in (each for each in audit.heads if each.layer == layer):
            assert head.retained == (1.0,) * 11
            mean = mass[head.text, head.head].mean().item()
            assert head.mean_low - 1e-10 <= mean <= head.mean_high + 1e-10
            assert head.mean_high - head.mean_low < 1e-10  # all rows were drawn


@pytest.mark.parametrize("family", ["Llama", "Gemma 2", "GPT-NeoX", "GPT-OSS"])
@torch.no_grad()
def test_on_the_bridge(family: str) -> None:
    model, text = families.build(family), families.tokens(61)
    logits, cache = model.run_with_sparse_cache(text, config=config(11))
    keep = {layer: cache.block_layout(layer).to_dense() for layer in cache.patterns}
    assert 0 < cache.pruned < 0.5
    with EditedAttention(keep, 61, masked(keep)):
        expected = model(text)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not cache.fallbacks


@torch.no_grad()
def test_steps_of_generation_read_everything() -> None:
    model, text = families.build("Llama"), families.tokens(40)
    rows: list[float] = []

    def note(pattern: Any, hook: Any) -> None:
        rows.append(pattern[..., -1:, :].retained_mass().min().item())

    with tl_stream.sparse(model, config(3)), model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_pattern"), note)]):
        model.generate(text, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    assert len(rows) == 4 * model.cfg.n_layers
    assert rows == [1.0] * len(rows)


@torch.no_grad()
def test_fidelity_and_budgets_count_them() -> None:
    model, text = build("gqa", torch.float32), tokens(batch=1)
    found, without = (tl_stream.fidelity(model, text, each, new_tokens=0) for each in (config(11), CONFIG))
    assert found.pruned < without.pruned
    assert all(a.retained_mean > b.retained_mean for a, b in zip(found.heads, without.heads, strict=True))
    search = tl_stream.find_budget(model, text, match=1, config=config(11))
    _, cache = model.run_with_sparse_cache(text, config=search.config)
    assert search.best is not None
    assert search.best.pruned == pytest.approx(cache.pruned)


@pytest.mark.parametrize("length", [1024, 4096])
def test_allocations_are_linear(length: int) -> None:
    model = build("gqa", torch.float32, n_layers=1, n_ctx=4096)
    settings = replace(CONFIG, block_q=32, block_k=32, k=4, estimator="dual", dense_queries=16)
    with LargestTensor() as largest:
        logits, cache = model.run_with_sparse_cache(tokens(length, batch=1), config=settings, logits_to_keep=1)
        logits.square().sum().backward()
        grad = cache["pattern", 0][..., -1, :].sum()
        with torch.no_grad():
            cache["pattern", 0].sum(-2), cache["pattern", 0].clone().zero_()
    assert grad.isfinite()
    assert largest.numel < 2**22
    assert largest.numel <= 4096 * length


def test_bad_values() -> None:
    with pytest.raises(TypeError, match=r"dense_queries was 1.5 of type float; expected an int >= 0"):
        StreamConfig(dense_queries=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dense_queries was -1; expected an int >= 0"):
        StreamConfig(dense_queries=-1)
    with pytest.raises(ValueError, match="dense_queries was 4 with forward='exact', where every row reads everything"):
        StreamConfig(dense_queries=4, forward="exact")


ALONG_KEYS: dict[str, Any] = {
    "median": lambda p: p.median(-1).values,
    "quantile": lambda p: p.quantile(0.9, -1),
    "quantiles": lambda p: p.quantile(torch.tensor([0.2, 0.9], dtype=p.dtype), dim=-1, keepdim=True),
    "product": lambda p: (p + 0.9).prod(-1, keepdim=True),
    "histogram": lambda p: p.histc(20, 0, 1),
    "histogram of all values": lambda p: (p - 0.5).histc(11),
}


@pytest.mark.parametrize("name", ALONG_KEYS)
@torch.no_grad()
def test_medians_and_histograms_of_both_kinds_of_rows(name: str) -> None:
    _, cache = build("gqa").run_with_sparse_cache(
        tokens(), config=StreamConfig(block_q=8, block_k=8, k=2, dense_queries=5, max_dense=0)
    )
    for shown in (cache["pattern", 1], cache["pattern", 1][0], cache["pattern", 1][:, 2]):
        assert gap(ALONG_KEYS[name](shown), ALONG_KEYS[name](shown.to_dense())) < 1e-9
    assert not cache.fallbacks
