"""What the estimators choose, against brute force and against properties that any good choice has."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tl_stream import BlockLayout, StreamConfig, estimate_layout
from tl_stream.budget import Linear, Sqrt
from tl_stream.masking import AttentionMask
from tl_stream.score_mod import Alibi, Scale, Tanh

CONFIG = StreamConfig(block_q=8, block_k=8, k=4, estimator="dual")


def queries_and_keys(length: int = 200, batch: int = 2, past: int = 0, seed: int = 0, d: int = 16) -> tuple[Tensor, Tensor]:
    """Queries that look for some few keys each, as trained heads do."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, 2, length + past, d, generator=generator)
    wanted = (torch.rand(batch, 4, length, generator=generator) * torch.arange(past + 1, past + length + 1)).long()
    of_head = k.repeat_interleave(2, 1)
    q = 2 * of_head.gather(2, wanted[..., None].expand(-1, -1, -1, d)) + torch.randn(batch, 4, length, d, generator=generator)
    return q, k


def topical_queries_and_keys(length: int) -> tuple[Tensor, Tensor]:
    """Keys that drift as a text's topic does, and queries that look for some few earlier keys, near ones for near queries."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 2, length, 16, generator=generator)
    k = noise.clone()
    for i in range(1, length):
        k[:, :, i] = 0.9 * k[:, :, i - 1] + 0.44 * noise[:, :, i]
    start = torch.rand(1, 4, -(-length // 40), generator=generator).repeat_interleave(40, 2)[:, :, :length]
    wanted = (start * torch.arange(length)).long()
    q = 2 * k.repeat_interleave(2, 1).gather(2, wanted[..., None].expand(-1, -1, -1, 16))
    return q + torch.randn(q.shape, generator=generator), k


def block_masses(q: Tensor, k: Tensor, mask: AttentionMask, block_q: int, block_k: int) -> Tensor:
    """The true mean mass of each key block for each query block, densely."""
    full = BlockLayout.full(mask, block_q, block_k, q.shape[0], q.shape[1])
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    pattern = scores.masked_fill(~full.to_dense(), -torch.inf).softmax(-1).nan_to_num(0)
    keys = torch.arange(k.shape[2]) // block_k
    by_block = torch.zeros(*pattern.shape[:3], full.n_kv_blocks).index_add_(-1, keys, pattern)
    rows = [by_block[:, :, i : i + block_q].mean(2) for i in range(0, q.shape[2], block_q)]
    return torch.stack(rows, 2)


def own_blocks(mask: AttentionMask, block_q: int, block_k: int) -> Tensor:
    """The key blocks in which the queries of each block stand themselves."""
    own = torch.zeros(-(-mask.query_length // block_q), -(-mask.key_length // block_k), dtype=torch.bool)
    own[torch.arange(mask.query_length) // block_q, (mask.stop.long() - 1) // block_k] = True
    return own


def retained(q: Tensor, k: Tensor, layout: BlockLayout) -> Tensor:
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    allowed = BlockLayout.full(layout.mask, 1, 1, layout.batch, layout.n_heads).to_dense()
    pattern = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
    return (pattern * layout.to_dense()).sum(-1)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("length", "past"), [(200, 0), (197, 0), (61, 70), (1, 150), (33, 8)])
def test_exact_keeps_the_blocks_of_greatest_mass(length: int, past: int, window: int | None, padded: bool) -> None:
    q, k = queries_and_keys(length, past=past)
    valid = torch.ones(2, length + past, dtype=torch.bool)
    valid[1, :21] = False
    mask = AttentionMask.causal(length, length + past, window=window, key_valid=valid if padded else None)
    layout = estimate_layout(q, k, replace(CONFIG, estimator="exact"), mask=mask)
    masses = block_masses(q, k, mask, 8, 8)
    own = own_blocks(mask, 8, 8)
    kept = layout.to_block_dense()
    assert (kept | ~own).all()
    beside = (kept & own & (masses < masses.topk(4).values[..., -1:])).sum(-1)
    best = masses.topk(4).values.sum(-1)
    assert ((kept.sum(-1) - beside) <= 4).all()
    assert torch.allclose(
        (masses * kept).sum(-1), best + (masses * (own & (masses < masses.topk(4).values[..., -1:]))).sum(-1), atol=1e-6
    )


@pytest.mark.parametrize("estimator", ["stream", "hip", "box"])
def test_a_tree_starts_inside_the_window(estimator: str) -> None:
    """So that what lies before it changes nothing, as in a text that begins there."""
    q, k = queries_and_keys(1024)
    config = replace(CONFIG, estimator=estimator)
    mask = AttentionMask.causal(1024, window=100)
    kept = estimate_layout(q, k, config, mask=mask).to_block_dense()[:, :, 864 // 8 :]
    later = mask.part(range(864, 1024), range(736, 1024))
    alone = estimate_layout(q[:, :, 864:], k[:, :, 736:], config, mask=later).to_block_dense()
    assert torch.equal(kept[..., 736 // 8 :], alone)
    assert not kept[..., : 736 // 8].any()


@pytest.mark.parametrize("estimator", ["auto", "dual", "exact", "stream", "hip", "box"])
def test_a_window_is_paid_for_by_its_length(estimator: str) -> None:
    def multiplications(length: int) -> int:
        config, mask = replace(CONFIG, estimator=estimator, beam=2), AttentionMask.causal(length, window=100)
        with FlopCounterMode(display=False) as counter:
            estimate_layout(*queries_and_keys(length, batch=1), config, mask=mask)
        return counter.get_total_flops()

    assert multiplications(4096) <= 2.2 * multiplications(2048)


@pytest.mark.parametrize("window", [None, 50])
def test_a_beam_as_wide_as_the_tree_is_exact(window: int | None) -> None:
    q, k = queries_and_keys()
    mask = AttentionMask.causal(200, window=window)
    wide = estimate_layout(q, k, replace(CONFIG, beam=8), mask=mask)
    exact = estimate_layout(q, k, replace(CONFIG, estimator="exact"), mask=mask)
    assert torch.equal(wide.to_block_dense(), exact.to_block_dense())


def test_a_narrow_beam_still_keeps_most_of_what_the_best_blocks_hold() -> None:
    q, k = topical_queries_and_keys(1500)
    best = retained(q, k, estimate_layout(q, k, replace(CONFIG, estimator="exact"))).mean()
    dual = retained(q, k, estimate_layout(q, k, CONFIG)).mean()
    window, random = (
        retained(q, k, estimate_layout(q, k, replace(CONFIG, estimator=name, seed=0))).mean() for name in ("window", "random")
    )
    assert dual > 0.9 * best
    assert dual > 1.5 * max(window, random)


def test_more_budget_never_retains_less() -> None:
    q, k = queries_and_keys(400, batch=1)
    masses = [
        retained(q, k, estimate_layout(q, k, replace(CONFIG, k=n, estimator="exact"))).mean().item() for n in (1, 2, 4, 8, 16)
    ]
    assert masses == sorted(masses)


@pytest.mark.parametrize("estimator", ["dual", "exact", "stream", "hip", "box", "window", "random"])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 64, 97, 257])
def test_every_choice_is_well_formed(length: int, estimator: str) -> None:
    """At most k blocks and the own one, causal, sorted, without repetition; all of them where k covers what there is."""
    q, k = queries_and_keys(length)
    layout = estimate_layout(q, k, replace(CONFIG, estimator=estimator, seed=0))
    blocks = layout.to_block_dense()
    causal = torch.ones(blocks.shape[-2:]).tril().bool()
    assert not (blocks & ~causal).any() or layout.is_full
    if layout.is_full:
        assert layout.n_kv_blocks <= 4
        return
    assert layout.kv_indices is not None
    assert layout.kv_num_blocks is not None
    assert torch.equal(blocks.sum(-1), layout.kv_num_blocks.long())
    assert (blocks | ~torch.eye(blocks.shape[-1], dtype=torch.bool)).all()
    available = torch.arange(1, blocks.shape[2] + 1).clamp(max=4)
    beside = layout.kv_num_blocks - available  # the own block, where it is not among the chosen ones
    assert ((beside == 0) | (beside == 1)).all()
    slots = torch.arange(layout.n_slots) < layout.kv_num_blocks[..., None]
    ascending = layout.kv_indices[..., 1:] > layout.kv_indices[..., :-1]
    assert (ascending | ~slots[..., 1:]).all()


def test_forced_blocks() -> None:
    q, k = queries_and_keys(400)
    q[:, :, 100:] = -4 * k.repeat_interleave(2, 1)[:, :, 100:]  # nobody reads itself
    own, first = torch.arange(50), torch.zeros(50, dtype=torch.long)
    free = estimate_layout(q, k, replace(CONFIG, k=2)).to_block_dense()
    assert free[:, :, own, own].all()
    assert not free[:, :, own, first].all()
    sink = estimate_layout(q, k, replace(CONFIG, k=2, keep_sink=True))
    assert sink.to_block_dense()[:, :, own, own].all()
    assert sink.to_block_dense()[:, :, own, first].all()
    assert sink.to_block_dense()[:, :, 1:].sum(-1).unique().tolist() == [2, 3]


def test_the_paths_to_the_own_and_the_first_block_are_always_followed() -> None:
    """A narrow beam, in which every other node looks better from above, still finds the two."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 1024, 16, generator=generator)
    k = 0.5 * torch.randn(1, 1, 1024, 16, generator=generator) + 0.1
    direction = torch.ones(16) / 4
    q = q * 0.1 + 8 * direction
    k[:, :, :8] = -direction * 2
    k[:, :, 3] = direction * 6
    layout = estimate_layout(q, k, StreamConfig(block_q=8, block_k=8, k=1, beam=2, estimator="dual"))
    assert layout.to_block_dense()[0, 0, 1:, 0].float().mean() > 0.99


@pytest.mark.parametrize(("length", "cut"), [(200, 104), (1203, 800)])
def test_causality_of_the_choice_between_blocks(length: int, cut: int) -> None:
    """What comes after a query block changes nothing in its choice, nor does that anything comes."""
    q, k = queries_and_keys(length)
    before = estimate_layout(q, k, CONFIG).to_block_dense()
    alone = estimate_layout(q[:, :, :cut], k[:, :, :cut], CONFIG).to_block_dense()
    q[:, :, cut:], k[:, :, cut:] = q[:, :, cut:].flip(2) * 3, k[:, :, cut:].flip(2) * 3
    after = estimate_layout(q, k, CONFIG).to_block_dense()
    assert torch.equal(before[:, :, : cut // 8], after[:, :, : cut // 8])
    assert torch.equal(before[:, :, : cut // 8, : cut // 8], alone)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("estimator", ["dual", "stream", "box", "hip", "exact"])
@pytest.mark.parametrize(
    ("block_q", "block_k", "k", "beam", "cut"),
    [(1, 4, 3, 1, 800), (1, 8, 3, 1, 797), (2, 8, 3, 1, 798), (32, 32, 2, 6, 800), (8, 8, 4, 2, 800)],
)
def test_strong_keys_in_the_future_change_no_choice(
    block_q: int, block_k: int, k: int, beam: int, cut: int, estimator: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    q, keys = 2 * torch.randn(2, 4, 1024, 8, generator=generator), torch.randn(2, 2, 1024, 8, generator=generator)
    config = StreamConfig(block_q=block_q, block_k=block_k, k=k, beam=beam, estimator=estimator)
    before = estimate_layout(q, keys, config).to_dense()[:, :, :cut]
    q[:, :, cut:], keys[:, :, cut:] = (20 * torch.randn(x[:, :, cut:].shape, generator=generator) for x in (q, keys))
    assert torch.equal(before, estimate_layout(q, keys, config).to_dense()[:, :, :cut])


@pytest.mark.parametrize("k", [3, Sqrt(0.5)], ids=repr)
@pytest.mark.parametrize("estimator", ["dual", "exact", "stream", "box", "hip", "window", "random"])
def test_a_longer_text_chooses_the_same_also_among_equals(estimator: str, k: int | Sqrt) -> None:
    """Scores that a soft-cap has saturated are the same for most keys."""
    q, keys = queries_and_keys(700, batch=1)
    mods = (Tanh(), Scale(3.0))
    config = StreamConfig(block_q=1, block_k=4, k=k, beam=2, estimator=estimator, seed=0)
    whole = estimate_layout(9 * q, keys, config, score_mods=mods).to_dense()
    for cut in (301, 599):
        part = estimate_layout(9 * q[:, :, :cut], keys[:, :, :cut], config, score_mods=mods).to_dense()
        assert torch.equal(whole[:, :, :cut, :cut], part)


def test_a_first_block_outside_the_window_is_not_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 512, 16, generator=generator), torch.randn(1, 2, 512, 16, generator=generator)
    mask = AttentionMask.causal(512, window=17)
    config = replace(CONFIG, k=Linear(0.5), keep_sink=True)
    kept, best = (retained(q, k, estimate_layout(q, k, replace(config, estimator=x), mask=mask)) for x in ("dual", "exact"))
    torch.testing.assert_close(kept, best)


@pytest.mark.parametrize("past", [0, 100])
def test_what_all_queries_read_at_far_places_is_found(past: int) -> None:
    """Each late query wants the keys 333 and 700 before it, which are random, and key 45.

    Judged once some of these queries have been sampled.
    """
    length, d = 1600, 64
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, length + past, d, generator=generator)
    special = torch.randn(d, generator=generator)
    k[:, :, 45] = special
    position = torch.arange(past, length + past)
    wanted = torch.stack([position - 333, position - 700, torch.full_like(position, 45)])[:, 900:]
    q = torch.randn(1, 1, length, d, generator=generator)
    q[:, :, 900:] = 0.5 * k[:, :, wanted].sum(2)
    narrow = StreamConfig(block_q=8, block_k=8, k=6, beam=1, estimator="dual")

    def found(estimator: str) -> Tensor:
        kept = estimate_layout(q, k, replace(narrow, estimator=estimator)).to_dense()[0, 0]
        return kept[torch.arange(900, length), wanted].float()[:, 100:].mean()

    assert found("dual") > 0.97 * found("exact")
    assert found("stream") < 0.5


def test_fewer_leaf_queries() -> None:
    q, k = topical_queries_and_keys(1200)
    every = estimate_layout(q, k, CONFIG)
    assert torch.equal(estimate_layout(q, k, replace(CONFIG, leaf_queries=8)).to_block_dense(), every.to_block_dense())
    some = estimate_layout(q, k, replace(CONFIG, leaf_queries=2))
    assert retained(q, k, some).mean() > 0.9 * retained(q, k, every).mean()


def test_the_last_query_is_always_asked() -> None:
    """Of the last block, of which only three queries exist, the last one alone reads key block 5."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 203, 16, generator=generator), torch.randn(1, 1, 203, 16, generator=generator)
    q[:, :, 202], k[:, :, 43] = 20.0, 3.0
    layout = estimate_layout(q, k, replace(CONFIG, leaf_queries=1, k=1))
    assert layout.to_block_dense()[0, 0, -1].nonzero().flatten().tolist() == [5, 25]


def test_score_mods_count() -> None:
    q, k = queries_and_keys(400, batch=1)
    plain = estimate_layout(q, k, replace(CONFIG, k=2))
    recent = estimate_layout(q, k, replace(CONFIG, k=2), score_mods=(Alibi(torch.full((4,), 5.0), 0),))
    own = torch.arange(1, 50)
    assert recent.to_block_dense()[:, :, own, own - 1].all()
    assert not plain.to_block_dense()[:, :, own, own - 1].all()
    capped = estimate_layout(q, k, CONFIG, score_mods=(Tanh(), Scale(1e-3)))
    assert capped.to_block_dense().sum(-1).max() in (4, 5)


def test_grouped_queries_equal_expanded_keys() -> None:
    q, k = queries_and_keys(300)
    grouped = estimate_layout(q, k, CONFIG)
    expanded = estimate_layout(q, k.repeat_interleave(2, 1), CONFIG)
    assert torch.equal(grouped.to_block_dense(), expanded.to_block_dense())


def test_padding_changes_nothing_but_positions() -> None:
    q, k = queries_and_keys(160, batch=1)
    pad_q, pad_k = (torch.cat([torch.randn_like(x[:, :, :24]) * 9, x], 2) for x in (q, k))
    valid = (torch.arange(184) >= 24)[None]
    layout = estimate_layout(pad_q, pad_k, CONFIG, mask=AttentionMask.causal(184, key_valid=valid))
    assert torch.equal(layout.to_block_dense()[:, :, 3:, 3:], estimate_layout(q, k, CONFIG).to_block_dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    q, k = (x.to(torch.bfloat16) for x in queries_and_keys(300))
    expected = estimate_layout(q.float(), k.float(), CONFIG)
    found = estimate_layout(q.to(dtype), k.to(dtype), CONFIG)
    assert (expected.to_block_dense() == found.to_block_dense()).float().mean() > 0.9999


def test_random_is_seeded_and_two_runs_are_identical() -> None:
    q, k = queries_and_keys()
    config = replace(CONFIG, estimator="random", seed=1)
    one, two, other = (estimate_layout(q, k, c).kv_indices for c in (config, config, replace(config, seed=2)))
    assert one is not None
    assert two is not None
    assert other is not None
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


COMPILED = """
import torch
from dataclasses import replace
from tl_stream import StreamConfig, estimate_layout
from tl_stream.masking import AttentionMask
torch.manual_seed(0)
config = StreamConfig(block_q=8, block_k=8, k=4, estimator="dual")
q, k = torch.randn(1, 4, 420, 16), torch.randn(1, 2, 420, 16)
for window in (None, 64):
    mask = AttentionMask.causal(420, window=window)
    eager = estimate_layout(q, k, config, mask=mask)
    by_config = estimate_layout(q, k, replace(config, compile=True), mask=mask)
    # How far a window reaches is read from the mask, as a number, which breaks the graph.
    whole = torch.compile(lambda q, k: estimate_layout(q, k, config, mask=mask), fullgraph=window is None)(q, k)
    for other in (by_config, whole):
        assert torch.equal(eager.kv_indices, other.kv_indices)
        assert torch.equal(eager.kv_num_blocks, other.kv_num_blocks)
print("same")
"""


def test_compiled_equals_eager() -> None:
    """In a process of its own: the checks of shapes and types that these tests run under can't be compiled."""
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "same", run.stderr


def test_bad_arguments() -> None:
    q, k = queries_and_keys(40)
    with pytest.raises(ValueError, match=r"k had 2 heads; expected a divisor of q's 3 heads"):
        estimate_layout(q[:, :3], k, CONFIG)
    with pytest.raises(ValueError, match=r"mask was for 39 queries and 39 keys; expected q's 40"):
        estimate_layout(q, k, CONFIG, mask=AttentionMask.causal(39))
