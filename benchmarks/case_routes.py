"""Do the routes from needle to answer carry the answer? Cut them, and as many other entries, and see whether it is still right.

The bundled model reads prompts of 4,096 tokens (RULER's niah_single_1 and niah_multikey_1, the demo's config) with their true
answer. For each of the 7 answer tokens the routes from the needle sentence to the row that generates it are found; the edges of
the first of each (or of the first three) are cut in one pass. An answer is right where each of its tokens is the most likely
one after the true ones before it: where generating greedily, from the prompt on, gives it. Controls: as many kept entries,
drawn from all layers, heads and rows; and drawn from the very rows (layer, head, query) that the routes' edges are in.
Intervals are Wilson's, at 95 %.

And the same texts with random blocks, where retrieval fails: which heads carry the needle in the one and not in the other?
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import tl_stream
from tl_stream import StreamConfig
from tl_stream.analysis import NeedleRoutes, compare_routes, cut_edges, flow_names, needle_routes, random_edges
from tl_stream.demo.job import CONFIG
from tl_stream.models.evaluate import wilson
from tl_stream.tasks import NeedleTask, niah_multikey_1, niah_single_1

TOKENS = 4096
TASKS = {"niah_single_1": niah_single_1, "niah_multikey_1": niah_multikey_1}
TOP = (1, 3)
FIRST_SEED = 10_000
BROKEN = replace(CONFIG, estimator="random", seed=0)


def right(model: Any, text: Tensor, edges: list[Any], config: StreamConfig = CONFIG) -> bool:
    """Whether the answer is, with some entries cut."""
    n_answer = text.shape[1] - TOKENS
    with tl_stream.sparse(model, config, logits_to_keep=n_answer + 1):
        logits = model.run_with_hooks(text, fwd_hooks=cut_edges(edges))
    return bool((logits[0, :-1].argmax(-1) == text[0, TOKENS:]).all())


def routes_of(model: Any, text: Tensor, task: NeedleTask, config: StreamConfig) -> tuple[Any, list[NeedleRoutes]]:
    """The cached run, and the routes to each row that generates an answer token."""
    _, cache = model.run_with_sparse_cache(text, config=config, names_filter=flow_names, logits_to_keep=1)
    steps = range(TOKENS - 1, text.shape[1] - 1)
    return cache, [needle_routes(cache, task.needle, step, top=max(TOP)) for step in steps]


@torch.inference_mode()
def routes(quick: bool) -> dict[str, Any]:
    """The study."""
    n_depths, n_seeds = (3, 1) if quick else (7, 2)
    depths = [i / (n_depths - 1) for i in range(n_depths)]
    model: Any = tl_stream.models.load()
    jobs = [(name, depth, FIRST_SEED + seed) for name in TASKS for depth in depths for seed in range(n_seeds)]
    texts: list[dict[str, Any]] = []
    successful: list[NeedleRoutes] = []
    failed: list[NeedleRoutes] = []
    for name, depth, seed in tqdm(jobs, desc="texts", file=sys.stderr):
        task = TASKS[name](model.tokenizer, TOKENS, depth=depth, seed=seed)
        text = model.to_tokens(f"{task.prompt} {task.answer}")
        cache, found = routes_of(model, text, task, CONFIG)
        texts.append({"task": name, "depth": depth, "seed": seed, **interventions(model, text, cache, found, seed)})
        (successful if texts[-1]["whole"] else failed).append(found[0])
        if not right(model, text, [], BROKEN):
            failed.append(routes_of(model, text, task, BROKEN)[1][0])
    comparison = compare_routes(successful, failed)
    heads = comparison.to_dataframe().head(6).round(4).to_dict("records")
    return {"summary": summary(texts) | {"comparison": repr(comparison), "heads": heads}, "texts": texts}


def interventions(model: Any, text: Tensor, cache: Any, found: list[NeedleRoutes], seed: int) -> dict[str, Any]:
    """Whether the answer is right, whole and after each kind of cut; and the number of edges of each."""
    result: dict[str, Any] = {"whole": right(model, text, []), "flow": [each.found for each in found]}
    for top in TOP:
        edges = list(dict.fromkeys(edge.entry for each in found for route in each.routes[:top] for edge in route.edges))
        result[f"top {top}: edges"] = len(edges)
        result[f"top {top}: cut"] = right(model, text, edges)
        result[f"top {top}: random"] = right(model, text, random_edges(cache, len(edges), seed=seed))
        result[f"top {top}: same rows"] = right(model, text, random_edges(cache, len(edges), rows=edges, seed=seed))
    return result


def summary(texts: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies with their intervals, and numbers of edges, over all texts."""
    kinds = ["whole", *(f"top {top}: {kind}" for top in TOP for kind in ("cut", "random", "same rows"))]
    made: dict[str, Any] = {"texts": len(texts)}
    for kind in kinds:
        accuracy = sum(text[kind] for text in texts) / len(texts)
        made[kind] = [accuracy, *(round(bound, 4) for bound in wilson(accuracy, len(texts)))]
    for top in TOP:
        counts = [text[f"top {top}: edges"] for text in texts]
        made[f"top {top}: edges"] = {"mean": sum(counts) / len(counts), "most": max(counts)}
    flows = [flow for text in texts for flow in text["flow"]]
    made["flow from the needle"] = {"mean": round(sum(flows) / len(flows), 4), "least": round(min(flows), 4)}
    return made
