"""Routes against all paths of dense tensors, and against what happens when the model is cut there."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import families
import pytest
import torch
from allocations import LargestTensor
from dense_reference import EditedAttention, masked
from test_information_flow import attention_weights
from torch import Tensor
from zoo import build, dense, gap, tokens

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import compare_routes, cut_edges, flow_names, needle_routes, random_edges
from tl_stream.analysis.followed import STAYED
from tl_stream.demo.job import CONFIG

LENGTH = 17
FULL = StreamConfig(block_q=4, block_k=4, k=100, max_dense=0)
PRUNED = StreamConfig(block_q=4, block_k=4, k=2, beam=1, max_dense=0)
CONFIGS = pytest.mark.parametrize("config", [FULL, PRUNED], ids=["full", "pruned"])


def all_paths(cache: Any, model: Any, target: int) -> dict[tuple[Any, ...], float]:
    """Every path to the target, by depth-first search: where it begins, its edges; and what it carries."""
    weights: dict[tuple[int, int], dict[Any, float]] = {}

    def walk(layer: int, row: int, score: float, edges: tuple[Any, ...]) -> Any:
        if layer < 0:
            yield (row, *edges), score
            return
        if (layer, row) not in weights:
            weights[layer, row] = attention_weights(cache, model, layer, 0, row)
            weights[layer, row]["stay"] += weights[layer, row].pop("mlp", 0.0)
        for name, weight in weights[layer, row].items():
            if name == "stay":
                yield from walk(layer - 1, row, score * weight, edges)
            else:
                head, key = name
                yield from walk(layer - 1, key, score * weight, ((layer, head, row, key), *edges))

    return dict(walk(model.cfg.n_layers - 1, target, 1.0, ()))


def check(cache: Any, model: Any, source: range, target: int, top: int = 200, rel: float = 1e-6) -> Any:
    """With everything followed: the best of all paths, and sums over all of them."""
    every = all_paths(cache, model, target)
    expected = {path: score for path, score in every.items() if path[0] in source}
    found = needle_routes(cache, source, target, model=model, top=top, follow=1.0)
    mine = {(route.source_pos, *(edge.entry for edge in route.edges)): route.score for route in found.routes}
    assert len(mine) == len(found.routes) == min(top, len(expected))
    assert all(mine[path] == pytest.approx(expected[path], rel=rel) for path in mine)
    assert list(mine.values()) == pytest.approx(sorted(expected.values(), reverse=True)[:top], rel=rel)
    assert [route.score for route in found.routes] == sorted(mine.values(), reverse=True)
    assert found.found == pytest.approx(sum(expected.values()), rel=rel)
    assert found.followed == pytest.approx(1.0, rel=rel)
    for route in found.routes:
        assert route.score <= math.prod(edge.weight for edge in route.edges) + 1e-9
    heads = {edge[:2] for path in expected for edge in path[1:]}
    assert found.flow_by_head.keys() == heads
    for layer, head in heads:
        through = [score for path, score in expected.items() if any(edge[:2] == (layer, head) for edge in path[1:])]
        assert found.flow_by_head[layer, head] == pytest.approx(sum(through), rel=rel)
    return found


@CONFIGS
@pytest.mark.parametrize("variant", ["gqa", "alibi", "local", "sinks", "parallel"])
@torch.no_grad()
def test_routes_are_the_best_of_all_paths(variant: str, config: StreamConfig) -> None:
    model = build(variant)
    _, cache = model.run_with_sparse_cache(tokens(LENGTH, batch=1), config=config)
    found = check(cache, model, range(3, 7), 9)
    assert found.exact_for == "the sparse model"
    check(cache, model, range(2), 6, top=10**6)


@CONFIGS
@pytest.mark.parametrize("follow", [0.3, 0.9, 0.99])
@torch.no_grad()
def test_as_much_is_followed_as_was_asked_for(follow: float, config: StreamConfig) -> None:
    """And no more than it takes: in each layer, without the least of the edges it would be too little."""
    model = build()
    _, cache = model.run_with_sparse_cache(tokens(LENGTH, batch=1), config=config)
    found = needle_routes(cache, range(3, 7), top=10**6, follow=follow)
    edges = followed_edges(cache, model, LENGTH - 1, follow)
    every = all_paths(cache, model, LENGTH - 1)
    paths = {path: score for path, score in every.items() if every_step(path, LENGTH - 1, 3) <= edges}
    assert found.followed == pytest.approx(sum(paths.values()), rel=1e-6)
    assert follow <= found.followed < follow + 0.1
    own = {path: score for path, score in paths.items() if path[0] in range(3, 7)}
    assert {(route.source_pos, *(edge.entry for edge in route.edges)) for route in found.routes} == own.keys()
    assert found.found == pytest.approx(sum(own.values()), rel=1e-6)
    assert f"{1 - found.followed:.2%} not followed" in repr(found)


def every_step(path: tuple[Any, ...], target: int, n_layers: int) -> set[Any]:
    """A path's edges, the layers where it stays among them."""
    read = {edge[0]: edge for edge in path[1:]}
    steps, position = set(), target
    for layer in reversed(range(n_layers)):
        steps.add(read.get(layer, (layer, STAYED, position, position)))
        position = read[layer][3] if layer in read else position
    return steps


def followed_edges(cache: Any, model: Any, target: int, follow: float) -> set[Any]:
    """What is to be followed, by loops: in each layer the edges of the largest flow, until they hold its share."""
    n_layers, edges = model.cfg.n_layers, set()
    stream = {target: 1.0}
    for step, layer in enumerate(reversed(range(n_layers)), 1):
        flows = {}
        for row, flow in stream.items():
            weights = attention_weights(cache, model, layer, 0, row)
            weights["stay"] += weights.pop("mlp", 0.0)
            for name, weight in weights.items():
                head, key = (STAYED, row) if name == "stay" else name
                flows[layer, head, row, key] = flow * weight
        keep = (1 - (1 - follow) * step / n_layers) / (1 - (1 - follow) * (step - 1) / n_layers)
        needed, stream, held = keep * sum(stream.values()), {}, 0.0
        for edge, flow in sorted(flows.items(), key=lambda item: -item[1]):
            if held >= needed:
                break
            held += flow
            edges.add(edge)
            stream[edge[3]] = stream.get(edge[3], 0.0) + flow
    return edges


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "GPT-OSS", "GPT-NeoX"])
@torch.no_grad()
def test_families_on_the_bridge(family: str) -> None:
    model = families.build(family, torch.float64 if family != "GPT-OSS" else torch.float32)
    _, cache = model.run_with_sparse_cache(families.tokens(LENGTH), config=PRUNED, names_filter=flow_names)
    check(cache, model, range(2, 5), 8, rel=1e-4)


@CONFIGS
@pytest.mark.parametrize("variant", ["gqa", "rotary"])
@torch.no_grad()
def test_cut_edges_cut_those_entries(variant: str, config: StreamConfig) -> None:
    """As the dense model does with the same entries set to -inf."""
    model, text = build(variant), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=config)
    edges = random_edges(cache, 30, seed=1)
    assert len(set(edges)) == 30
    for layer, head, query, key in edges:
        assert cache.block_layout(layer).to_dense()[0, head, query, key]
    edges = [edge for edge in edges if edge[2] > edge[3]]  # a row that loses everything is NaN in a dense bridge
    with tl_stream.sparse(model, replace(config, layout_from=cache)):
        cut = model.run_with_hooks(text, fwd_hooks=cut_edges(edges))

    def hook(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.masked_fill(~cache.block_layout(hook.layer()).to_dense(), -torch.inf)
        for layer, head, query, key in edges:
            if layer == hook.layer():
                scores[:, head, query, key] = -torch.inf
        return scores

    names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(3)]
    expected = model.run_with_hooks(text, fwd_hooks=[(name, hook) for name in names])
    assert gap(cut, expected) < 1e-9
    assert gap(cut, dense(model(text))) > 1e-6


@pytest.mark.parametrize("forward", ["sparse", "exact"])
@pytest.mark.parametrize("family", ["Llama", "GPT-2", "OPT", "BLOOM", "GPT-OSS", "Native"])
@torch.no_grad()
def test_cuts_count_in_families_on_the_bridge(family: str, forward: str) -> None:
    """As with the same entries set to -inf in the dense model, between its scores and their softmax."""
    model, text = families.build(family, torch.float64), families.tokens(LENGTH)
    config = replace(PRUNED, forward=forward)
    _, cache = model.run_with_sparse_cache(text, config=config)
    edges = [edge for edge in random_edges(cache, 60, seed=1) if edge[2] > edge[3]]
    keep = {layer: layout_of(cache, layer, forward) for layer in cache.patterns}
    for layer, head, query, key in edges:
        keep[layer][:, head, query, key] = False
    with EditedAttention(sorted(keep), LENGTH, on_scores=masked(keep)):
        expected = model(text)
    with tl_stream.sparse(model, replace(config, layout_from=cache)):
        cut = model.run_with_hooks(text, fwd_hooks=cut_edges(edges))
        whole = model(text)
    assert gap(cut, expected) < 1e-6
    assert gap(cut, whole) > 1e-4


def layout_of(cache: Any, layer: int, forward: str) -> Tensor:
    """What the model reads, as a dense mask."""
    layout = cache.block_layout(layer)
    return (layout if forward == "sparse" else layout.to_full()).to_dense()


@torch.no_grad()
def test_random_edges_of_the_same_rows() -> None:
    model = build()
    _, cache = model.run_with_sparse_cache(tokens(LENGTH), config=PRUNED)
    edges = [(1, 2, 12, 12), (1, 2, 12, 11), (0, 3, 9, 8)]
    drawn = random_edges(cache, 5, rows=edges, text=1, seed=3)
    assert {edge[:3] for edge in drawn} <= {edge[:3] for edge in edges}
    assert not set(drawn) & set(edges)
    assert random_edges(cache, 5, rows=edges, text=1, seed=3) == drawn
    with pytest.raises(ValueError, match="n was 1000; expected 0 to"):
        random_edges(cache, 1000, rows=edges)


def answers(model: Any, text: Tensor, n_prompt: int, edges: Any) -> bool:
    """Whether each token of the answer is the most likely one after what comes before it: greedy generation would be right."""
    with tl_stream.sparse(model, CONFIG, logits_to_keep=text.shape[1] - n_prompt + 1):
        logits = model.run_with_hooks(text, fwd_hooks=cut_edges(edges))
    return bool((logits[0, :-1].argmax(-1) == text[0, n_prompt:]).all())


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_1"])
@torch.inference_mode()
def test_cutting_the_top_routes_breaks_retrieval(task: str) -> None:
    """On the bundled model: the one top route to each answer token, 2 or 3 edges, against as many kept edges at random."""
    model: Any = tl_stream.models.load()
    make, length = getattr(tl_stream.tasks, task), 1024
    right = {"whole": 0, "routes cut": 0, "random edges cut": 0, "random edges of the same rows cut": 0}
    for seed in range(10_000, 10_003):
        needle = make(model.tokenizer, length, depth=seed % 3 / 2, seed=seed)
        text = model.to_tokens(f"{needle.prompt} {needle.answer}")
        _, cache = model.run_with_sparse_cache(text, config=CONFIG, names_filter=flow_names, logits_to_keep=1)
        steps = range(length - 1, text.shape[1] - 1)
        routes = [needle_routes(cache, needle.needle, step, top=1) for step in steps]
        edges = list(dict.fromkeys(edge.entry for found in routes for edge in found.edges))
        assert len(edges) <= 3 * len(routes)
        cuts: dict[str, Any] = {
            "whole": [],
            "routes cut": edges,
            "random edges cut": random_edges(cache, len(edges), seed=seed),
            "random edges of the same rows cut": random_edges(cache, len(edges), rows=edges, seed=seed),
        }
        for name, cut in cuts.items():
            right[name] += answers(model, text, length, cut)
    assert right == {"whole": 3, "routes cut": 0, "random edges cut": 3, "random edges of the same rows cut": 3}


@torch.inference_mode()
def test_failed_retrievals_carry_less_of_the_needle() -> None:
    model: Any = tl_stream.models.load()
    by_outcome: dict[bool, list[Any]] = {True: [], False: []}
    for seed, k in product(range(2), (1, 6)):
        task = tl_stream.tasks.niah_single_1(model.tokenizer, 1024, depth=0.2, seed=seed)
        config = replace(CONFIG, k=k, estimator="window" if k == 1 else "dual")
        logits, cache = model.run_with_sparse_cache(task.prompt, config=config, names_filter=flow_names, logits_to_keep=1)
        right = model.to_string(logits[0, -1].argmax()) == task.answer[0]
        by_outcome[right].append(needle_routes(cache, task.needle, top=5))
    assert [len(by_outcome[right]) for right in (True, False)] == [2, 2]
    comparison = compare_routes(by_outcome[True], by_outcome[False])
    assert comparison.found_successful > 0.3 > 0.01 > comparison.found_failed
    assert {head.layer for head in comparison.heads[:3]} <= {0, 1}
    assert comparison.heads[0].difference > 0.1
    assert len(comparison.to_dataframe()) == comparison.table().row_count == len(comparison.heads)
    with pytest.raises(ValueError, match="There were 2 successful and 0 failed"):
        compare_routes(by_outcome[True], [])


@torch.no_grad()
def test_shown_as_table_frame_and_figure() -> None:
    model = build()
    _, cache = model.run_with_sparse_cache(tokens(LENGTH, batch=1), config=PRUNED)
    found = needle_routes(cache, slice(3, 7), top=5)
    assert found.table().row_count == len(found.routes) == 5
    frame = found.to_dataframe()
    assert len(frame) == sum(len(route.edges) for route in found.routes)
    assert len(found.edges) == len({edge.entry for edge in found.edges}) <= len(frame)
    figure = found.plot([f"token{i}" for i in range(LENGTH)])
    assert len(figure.data) == 5
    for line, route in zip(figure.data, found.routes, strict=True):
        assert len(line.x) == 4
        assert figure.layout.xaxis.ticktext[line.x[0]] == f"{route.source_pos} token{route.source_pos}"
    with pytest.raises(ValueError, match="tokens were 3; expected one for each position, up to 16"):
        found.plot(["a", "b", "c"])
    none = needle_routes(cache, slice(3, 7), follow=0.05)
    assert none.routes == ()
    assert none.found == 0
    with pytest.raises(ValueError, match="no route to plot"):
        none.plot()


@torch.no_grad()
def test_bad_arguments() -> None:
    model, text = build(), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=PRUNED)
    with pytest.raises(
        ValueError, match=r"source_span was tokens 12 to 30; expected 0 <= start < stop <= 17.*cut the text off"
    ):
        needle_routes(cache, slice(12, 30))
    with pytest.raises(ValueError, match="source_span was tokens 5 to 5"):
        needle_routes(cache, slice(5, 5))
    with pytest.raises(TypeError, match="source_span was 5; expected token positions"):
        needle_routes(cache, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_pos was 3, before the source at 8"):
        needle_routes(cache, slice(8, 10), 3)
    with pytest.raises(IndexError, match="target_pos was 17"):
        needle_routes(cache, slice(8, 10), 17)
    with pytest.raises(ValueError, match="top was 0"):
        needle_routes(cache, slice(8, 10), top=0)
    with pytest.raises(ValueError, match=r"follow was 1\.5; expected the share of the stream to follow, above 0"):
        needle_routes(cache, slice(8, 10), follow=1.5)
    _, usual = model.run_with_cache(text)
    with pytest.raises(TypeError, match="cache was a ActivationCache; expected a SparseActivationCache"):
        needle_routes(usual, slice(8, 10))
    _, nothing = model.run_with_sparse_cache(text, config=PRUNED, names_filter="blocks.1.attn.hook_v")
    with pytest.raises(ValueError, match="The cache holds no pattern"):
        needle_routes(nothing, slice(8, 10))
    with pytest.raises(ValueError, match=r"edges held .* = \(0, 0, 3, 4\); expected counts from 0"):
        cut_edges([(0, 0, 3, 4)])
    with (
        pytest.raises(ValueError, match="its scores are of shape"),
        tl_stream.sparse(model, PRUNED),
    ):
        model.run_with_hooks(text, fwd_hooks=cut_edges([(0, 0, LENGTH, 2)]))
    assert gap(model(text), build()(text)) == 0


@torch.no_grad()
def test_analyses_take_linear_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a length where T x T stands out; a dense layer included."""
    monkeypatch.setattr("tl_stream.analysis.kept.CHUNK_ENTRIES", 2**15)
    monkeypatch.setattr("tl_stream.analysis.attention_flow.CHUNK_NUMBERS", 2**15)
    monkeypatch.setattr("tl_stream.attention.chunks.CHUNK_ENTRIES", 2**15)
    model, length = build("gqa", torch.float32, n_ctx=8192, d_vocab=40), 2048
    text = torch.randint(0, 40, (1, length))
    config = StreamConfig(block_q=16, block_k=16, k=4, dense_layers=(1,))
    _, cache = model.run_with_sparse_cache(text, config=config)
    with LargestTensor() as watch:
        tl_stream.analysis.head_scores(cache, text)
        tl_stream.analysis.over_squashing(cache)
        needle_routes(cache, slice(100, 120))
        tl_stream.analysis.information_flow(cache, model, threshold=0.02)
        random_edges(cache, 10)
    assert watch.numel < length * length / 8
    assert not cache.fallbacks
