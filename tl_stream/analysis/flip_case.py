"""One prompt of a search for flips: its runs with and without inserted tokens, dense and sparse."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_stream.analysis.flip_result import Flip, FlipRun
from tl_stream.cache import SparseActivationCache, is_pattern
from tl_stream.config import StreamConfig
from tl_stream.fidelity.runs import dense_config, greedy_answers, thin_answers
from tl_stream.recheck import recheck
from tl_stream.tracing import run_with_sparse_cache, sparse


class Case:
    """One prompt, its dense answer, and a place for further tokens."""

    def __init__(
        self, model: Any, prompt: Int[Tensor, "1 pos"], config: StreamConfig, match: int, n_tokens: int, position: int | None
    ) -> None:
        if len(prompt) != 1:
            raise ValueError(f"A prompt was of shape {tuple(prompt.shape)}; expected one text: [pos] or [1, pos].")
        self.model, self.prompt, self.config, self.n_tokens = model, prompt, config, n_tokens
        length, n_ctx = prompt.shape[1], model.cfg.n_ctx
        if length + n_tokens + match > n_ctx:
            raise ValueError(
                f"A prompt was {length} tokens long, with {n_tokens} inserted and {match} generated more than the model's "
                f"n_ctx of {n_ctx}; expected at most {n_ctx - n_tokens - match}."
            )
        starts_with_bos = model.tokenizer is not None and prompt[0, 0].item() == model.tokenizer.bos_token_id
        self.position = int(starts_with_bos) if position is None else position
        if not 0 <= self.position <= length:
            raise ValueError(f"position was {position}; expected one from 0 to the prompt's {length} tokens.")
        self.dense = dense_config(config)
        with sparse(model, self.dense, logits_to_keep=1):
            answers = greedy_answers(model, prompt, match, n_ctx - length - n_tokens)
        for said in thin_answers(model.tokenizer, answers, match):
            warnings.warn(f"The dense answer to a prompt says little: {said}.", stacklevel=4)  # find_flips, below torch.no_grad
        self.answer = torch.tensor(answers[0], device=prompt.device)

    def text(self, inserted: Int[Tensor, "candidate token"] | None) -> Int[Tensor, "candidate pos"]:
        """The prompt with tokens inserted (None: without), and the answer but for its last token."""
        whole = torch.cat([self.prompt, self.answer[None, :-1]], 1)
        if inserted is None:
            return whole
        before, after = whole.expand(len(inserted), -1).tensor_split([self.position], 1)
        return torch.cat([before, inserted.to(whole.device), after], 1)

    def margins(self, logits: Float[Tensor, "candidate token d_vocab"]) -> Float[Tensor, " candidate"]:
        """By how much the answer's logits exceed all others, at the answer's token where that is least; negative: flipped."""
        logits = logits.float()
        index = self.answer.to(logits.device).expand(len(logits), -1)[..., None]
        own = logits.gather(-1, index)
        return (own - logits.scatter(-1, index, -torch.inf).amax(-1, keepdim=True)).amin((1, 2))

    def run(self, inserted: Tensor | None, config: StreamConfig) -> Float[Tensor, " candidate"]:
        """The margins under a config."""
        with sparse(self.model, config, logits_to_keep=len(self.answer)):
            return self.margins(self.model(self.text(inserted)))

    def audited(self, inserted: Int[Tensor, " token"] | None, k: int | None) -> FlipRun:
        """One run, and what the audit says of its answer's rows; `k` None: nothing is pruned."""
        n, text = len(self.answer), self.text(None if inserted is None else inserted[None])
        logits, cache = run_with_sparse_cache(
            self.model,
            text,
            config=self.dense if k is None else replace(self.config, k=k),
            logits_to_keep=n,
            names_filter=is_pattern,
        )
        assert isinstance(cache, SparseActivationCache)
        (alone,) = cache.audit(rows=n, sample=0).answers
        (rows,) = recheck(self.model, text, cache, rows=n, sample=0).answers
        same, least = bool(self.margins(logits)[0] >= 0), min(rows.retained)
        chances = alone.flip_chance, rows.flip_chance
        return FlipRun(k, same, cache.pruned, least, *chances, alone.trusted, rows.trusted)

    def unattacked(self) -> FlipRun:
        """The sparse model's run without tokens."""
        k: Any = self.config.k
        return self.audited(None, k)

    def flipped_alone(self, number: int, unattacked: FlipRun) -> Flip:
        """The entry of a prompt whose answer the sparse model flips without any tokens."""
        return Flip(number, tuple(self.answer.tolist()), (), 0, unattacked)

    def examine(self, number: int, unattacked: FlipRun, inserted: Int[Tensor, " token"], tried: int) -> Flip:
        """The table's runs."""
        k: Any = self.config.k
        attacked = self.audited(inserted, k)
        return Flip(
            prompt=number,
            answer=tuple(self.answer.tolist()),
            inserted=tuple(inserted.tolist()),
            tried=tried,
            sparse=unattacked,
            vanilla=self.audited(inserted, None),
            k1=self.audited(inserted, k // 2) if k > 1 else None,
            k_adv=attacked,
            k2=None if attacked.same else self._restored(inserted, k),
        )

    def _restored(self, inserted: Tensor, k: int) -> FlipRun | None:
        """The first larger budget, doubling, that gives the answer again."""
        n_blocks = -(-self.text(inserted[None]).shape[1] // self.config.block_k)
        while (k := 2 * k) < n_blocks:
            if (run := self.audited(inserted, k)).same:
                return run
        return None
