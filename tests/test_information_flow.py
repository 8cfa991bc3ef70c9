"""Information flow and path sums against brute force over dense tensors."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from zoo import build, tokens

from tl_stream import StreamConfig
from tl_stream.analysis import flow_names, information_flow, over_squashing

LENGTH = 29
FULL = StreamConfig(block_q=8, block_k=8, k=100, max_dense=0)
PRUNED = StreamConfig(block_q=8, block_k=8, k=2, beam=1, max_dense=0)
CONFIGS = pytest.mark.parametrize(
    "config", [FULL, PRUNED, replace(PRUNED, dense_layers=1)], ids=["full", "pruned", "a dense layer"]
)


def importance(whole: Tensor, part: Tensor) -> float:
    return max(float(whole.abs().sum() - (whole - part).abs().sum()), 1e-5)


def attention_weights(cache: Any, model: Any, layer: int, text: int, row: int) -> dict[Any, float]:
    """Weights of all edges into a position after attention, as the paper defines them; loops over dense tensors."""
    pattern, kept = cache["pattern", layer].to_dense()[text], cache.block_layout(layer).to_dense()[text]
    W_O = model.blocks[layer].attn.W_O
    v = cache["v", layer][text].flatten(1).unflatten(1, (-1, W_O.shape[1]))
    group = len(pattern) // v.shape[1]
    parallel, attn_only = model.cfg.parallel_attn_mlp, model.cfg.attn_only
    whole = cache["resid_post" if parallel or attn_only else "resid_mid", layer][text, row]
    parts: dict[Any, float] = {"stay": importance(whole, cache["resid_pre", layer][text, row])}
    if parallel:
        parts["mlp"] = importance(whole, cache["mlp_out", layer][text, row])
    gain = norm_after_attention(model, layer, cache["z", layer][text, row], W_O)
    for head in range(len(pattern)):
        for key in kept[head, row].nonzero().flatten().tolist():
            part = pattern[head, row, key] * v[key, head // group] @ W_O[head] * gain
            parts[head, key] = importance(whole, part)
    total = sum(parts.values())
    return {name: weight / total for name, weight in parts.items()}


def norm_after_attention(model: Any, layer: int, z: Tensor, W_O: Tensor) -> Tensor | float:
    """What Gemma multiplies the sum of all heads by: its weights and 1, over the root mean square."""
    norm = getattr(model.blocks[layer], "ln1_post", None)
    if norm is None:
        return 1.0
    whole = torch.einsum("hd,hdm->m", z.reshape(W_O.shape[:2]), W_O)
    return (1.0 + norm.weight) / (whole.square().mean() + 1e-6).sqrt()


def expected_graph(cache: Any, model: Any, target: int, threshold: float, text: int) -> dict[Any, float]:
    """All edges of the graph by brute force."""
    edges: dict[Any, float] = {}
    reached = {target}
    for layer in reversed(range(model.cfg.n_layers)):
        below = set()
        for row in reached:
            if not (model.cfg.parallel_attn_mlp or model.cfg.attn_only):
                mid, post = cache["resid_mid", layer][text, row], cache["resid_post", layer][text, row]
                mlp, past = importance(post, post - mid), importance(post, mid)
                edges["mlp", layer, None, row, row] = mlp / (mlp + past)
                edges["past_mlp", layer, None, row, row] = past / (mlp + past)
            for name, weight in attention_weights(cache, model, layer, text, row).items():
                kind = {"stay": "past_attention", "mlp": "mlp"}.get(name, "attention")
                head, key = name if kind == "attention" else (None, row)
                edges[kind, layer, head, row, key] = weight
                if weight >= threshold:
                    below.add(key)
        reached = below
    return {edge: weight for edge, weight in edges.items() if weight >= threshold}


def check(cache: Any, model: Any, target: int, threshold: float, text: int, tolerance: float) -> None:
    graph = information_flow(cache, model, target, threshold=threshold, text=text)
    found = {tuple(edge[:5]): edge.weight for edge in graph.edges}
    assert len(found) == len(graph.edges)
    expected = expected_graph(cache, model, target, threshold, text)
    assert found.keys() == expected.keys()
    assert all(found[edge] == pytest.approx(weight, abs=tolerance) for edge, weight in expected.items())


@CONFIGS
@pytest.mark.parametrize("variant", ["gqa", "standard", "alibi", "local", "soft-capped", "sinks", "ungrouped gqa", "parallel"])
@torch.no_grad()
def test_the_graph_equals_brute_force(variant: str, config: StreamConfig) -> None:
    model = build(variant)
    _, cache = model.run_with_sparse_cache(tokens(LENGTH), config=config)
    check(cache, model, LENGTH - 1, 0.01, 1, 1e-6)
    assert not cache.fallbacks


@CONFIGS
@pytest.mark.parametrize("variant", ["gqa", "parallel"])
@pytest.mark.parametrize("follow", [0.5, 0.9, 1.0])
@torch.no_grad()
def test_as_much_is_followed_as_was_asked_for(variant: str, follow: float, config: StreamConfig) -> None:
    """The fewest edges that hold each step's share of what comes into it: without the least of them it would be too little."""
    model = build(variant)
    _, cache = model.run_with_sparse_cache(tokens(LENGTH), config=config)
    for target in (LENGTH - 1, None):
        graph = information_flow(cache, model, target, follow=follow)
        assert graph.followed >= follow - 1e-9
        frame = graph.to_dataframe()
        steps = list(frame.groupby([-frame["layer"], ~frame["kind"].isin(["mlp", "past_mlp"]) | (variant == "parallel")]))
        stream = dict.fromkeys(graph.targets, 1 / len(graph.targets))
        for i, (_, edges) in enumerate(steps, 1):
            assert edges["flow"].tolist() == pytest.approx([stream[e.query_pos] * e.weight for e in edges.itertuples()])
            keep = (1 - (1 - follow) * i / len(steps)) / (1 - (1 - follow) * (i - 1) / len(steps)) * sum(stream.values())
            assert edges["flow"].sum() >= keep - 1e-9
            assert edges["flow"].sum() - edges["flow"].min() < keep
            stream = edges.groupby("key_pos")["flow"].sum().to_dict()
        assert graph.followed == pytest.approx(sum(stream.values()))
        assert f"{graph.followed:.2%} of the stream, {1 - graph.followed:.2%} not followed" in repr(graph)


@torch.no_grad()
def test_with_everything_followed_every_edge_is_there() -> None:
    model = build()
    _, cache = model.run_with_sparse_cache(tokens(LENGTH), config=PRUNED)
    found = {tuple(edge[:5]) for edge in information_flow(cache, model, follow=1.0).edges}
    assert found == expected_graph(cache, model, LENGTH - 1, 0.0, 0).keys()


@torch.no_grad()
def test_a_threshold_that_follows_little_says_so() -> None:
    """The share is that of all paths of edges of such a weight."""
    model = build()
    _, cache = model.run_with_sparse_cache(tokens(LENGTH), config=PRUNED)
    with pytest.warns(UserWarning, match=r"% of the stream, .*% not followed.*give follow=0.9"):
        graph = information_flow(cache, model, threshold=0.2)
    into: dict[Any, float] = {("resid_pre", 3, LENGTH - 1): 1.0}
    for edge in graph.edges:
        below, above = graph.nodes(edge)
        into[below] = into.get(below, 0.0) + into[above] * edge.weight
    assert graph.followed == pytest.approx(sum(share for node, share in into.items() if node[:2] == ("resid_pre", 0)))
    assert graph.followed < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert information_flow(cache, model, threshold=1e-4).followed > 0.5


@pytest.mark.parametrize(
    "family", ["Llama", "GPT-2", "GPT-OSS", "BLOOM", "GPT-NeoX", "Falcon", "Native, attention only", "Gemma 2", "Gemma 3"]
)
@torch.no_grad()
def test_families_on_the_bridge(family: str) -> None:
    model = families.build(family, torch.float64 if family != "GPT-OSS" else torch.float32)
    if family.startswith("Gemma"):
        for block in model.blocks:
            block.ln1_post.original_component.weight.uniform_(-0.5, 0.5)  # 0 in a model not trained yet, which stands for 1
    _, cache = model.run_with_sparse_cache(families.tokens(LENGTH), config=PRUNED, names_filter=flow_names)
    check(cache, model, 20, 0.02, 0, 1e-5)


@torch.no_grad()
def test_all_positions_hold_the_graph_of_each() -> None:
    model = build()
    _, cache = model.run_with_sparse_cache(tokens(LENGTH), config=PRUNED)
    every = information_flow(cache, model, None, threshold=0.05)
    assert every.targets == tuple(range(LENGTH))
    one = information_flow(cache, model, 17, threshold=0.05)
    assert {edge[:5] for edge in one.edges} <= {edge[:5] for edge in every.edges}


@torch.no_grad()
def test_the_exact_forward_weighs_recorded_entries() -> None:
    """With everything recorded the graph is the dense model's; of a part of it, its parts are those."""
    model, text = build(), tokens(LENGTH)
    _, dense = model.run_with_sparse_cache(text, config=FULL)
    _, whole = model.run_with_sparse_cache(text, config=replace(FULL, forward="exact"))
    a, b = (information_flow(cache, model, -1) for cache in (dense, whole))
    assert [edge[:5] for edge in a.edges] == [edge[:5] for edge in b.edges]
    assert all(x.weight == pytest.approx(y.weight, abs=1e-6) for x, y in zip(a.edges, b.edges, strict=True))
    _, part = model.run_with_sparse_cache(text, config=replace(PRUNED, forward="exact"))
    check(part, model, LENGTH - 1, 0.01, 0, 1e-6)
    assert information_flow(part, model).exact_for == "the real model, its recorded entries alone"


@torch.no_grad()
def test_shown_as_networkx_json_and_frame() -> None:
    model = build()
    _, cache = model.run_with_sparse_cache(tokens(LENGTH), config=PRUNED)
    found = information_flow(cache, model, 20, follow=1.0)
    graph = found.to_networkx()
    assert graph.number_of_edges() == len(found.edges) == len(found.to_dataframe())
    assert ("resid_pre", 3, 20) in graph
    for node in graph:
        into = sum(edge["weight"] for _, _, edge in graph.in_edges(node, data=True))
        assert into == pytest.approx(0.0 if node[:2] == ("resid_pre", 0) else 1.0, abs=1e-6)
    plain = json.loads(found.to_json())
    assert plain["targets"] == [20]
    assert plain["edges"][3] == found.edges[3]._asdict()
    assert "exact for the sparse model" in repr(found)


@torch.no_grad()
def test_an_edited_run_is_weighed_as_it_was() -> None:
    """Entries that a hook cut carry nothing."""
    model = build()

    def cut(scores: Tensor, hook: Any) -> Tensor:
        scores[:, 1, :, 3] = -torch.inf
        return scores

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_attn_scores", cut)]):
        _, cache = model.run_with_sparse_cache(tokens(LENGTH), config=FULL)
    edges = information_flow(cache, model, None, threshold=1e-4).edges
    assert not [edge for edge in edges if edge[:3] == ("attention", 1, 1) and edge.key_pos == 3]
    assert [edge for edge in edges if edge[:3] == ("attention", 1, 0) and edge.key_pos == 3]


def expected_sums(cache: Any, target: int, text: int) -> Tensor:
    product = torch.eye(LENGTH, dtype=torch.float64)
    for layer in cache.patterns:
        mean = cache["pattern", layer].to_dense()[text].double().mean(0)
        product = (mean + torch.eye(LENGTH)) @ product
    return product[target]


@CONFIGS
@pytest.mark.parametrize("variant", ["gqa", "alibi", "local", "sinks"])
@torch.no_grad()
def test_path_sums_equal_dense_products(variant: str, config: StreamConfig) -> None:
    _, cache = build(variant).run_with_sparse_cache(tokens(LENGTH), config=config)
    for text in range(2):
        sums = over_squashing(cache, [-1, 12], text=text)
        assert sums.targets == (LENGTH - 1, 12)
        for row, target in zip(sums.bounds, sums.targets, strict=True):
            assert (row - expected_sums(cache, target, text)).abs().max() < 1e-6
            assert row[target + 1 :].abs().sum() == 0
        if variant != "sinks":
            assert torch.allclose(sums.bounds.sum(-1), torch.full((2,), 8.0, dtype=torch.float64), atol=1e-5)
        assert torch.allclose(sums.of(slice(3, 7)), sums.bounds[:, 3:7].sum(-1))


@torch.no_grad()
def test_path_sums_by_depth_and_length() -> None:
    _, cache = build().run_with_sparse_cache(tokens(LENGTH), config=PRUNED)
    sums = over_squashing(cache, [9, -1])
    frame = sums.to_dataframe(depths=[0.0, 0.5, 1.0])
    assert frame["length"].tolist() == [10] * 3 + [LENGTH] * 3
    assert frame["bound"][0] == pytest.approx(float(sums.bounds[0, :2].mean()))
    assert frame["bound"][1] == pytest.approx(float(sums.bounds[0, 2:8].mean()))
    assert len(sums.to_dataframe()) == 22


@torch.no_grad()
def test_bad_arguments() -> None:
    model, text = build(), tokens(LENGTH)
    _, cache = model.run_with_sparse_cache(text, config=PRUNED)
    with pytest.raises(IndexError, match="target_pos was 29; expected a token position from -29 to 28"):
        information_flow(cache, model, 29)
    with pytest.raises(ValueError, match=r"follow was 0\.9 and threshold 0\.1; expected one of them"):
        information_flow(cache, model, follow=0.9, threshold=0.1)
    with pytest.raises(ValueError, match="follow was 0; expected the share of the stream"):
        information_flow(cache, model, follow=0)
    with pytest.raises(ValueError, match="threshold was 0; expected a weight between 0 and 1"):
        information_flow(cache, model, threshold=0)
    with pytest.raises(IndexError, match="text was 2; expected the index of one of the 2 texts"):
        information_flow(cache, model, text=2)
    with pytest.raises(TypeError, match="model was a int"):
        information_flow(cache, 3)
    with pytest.raises(ValueError, match="target_pos was empty"):
        over_squashing(cache, [])
    with pytest.raises(ValueError, match="depths were"):
        over_squashing(cache).to_dataframe([0.5, 0.2])
    _, without = model.run_with_sparse_cache(text, config=PRUNED, names_filter=lambda name: not name.endswith("hook_v"))
    with pytest.raises(KeyError, match=r"lacks 'v' of layer 2.*flow_names"):
        information_flow(without, model)
    _, part = model.run_with_sparse_cache(text, config=PRUNED, stop_at_layer=2)
    with pytest.raises(ValueError, match=r"no pattern of layers \[2\]"):
        information_flow(part, model)
    _, slices = model.run_with_sparse_cache(text, config=PRUNED, pos_slice=slice(5, 20))
    with pytest.raises(ValueError, match="expected that of a whole text"):
        over_squashing(slices)


@pytest.mark.parametrize("family", ["BitNet", "DeepSeek V3"])
@torch.no_grad()
def test_models_whose_parts_are_others_are_refused(family: str) -> None:
    """Their attention is normed or gated on its way into the residual stream, in ways that the bridge doesn't show."""
    model = families.build(family)
    _, cache = model.run_with_sparse_cache(families.tokens(LENGTH), config=PRUNED)
    with pytest.raises(ValueError, match=r"does not add pattern @ v @ W_O|latent attention can't be analysed"):
        information_flow(cache, model)
