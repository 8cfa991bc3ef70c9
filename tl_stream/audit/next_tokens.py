"""What a run says next, and how sure it is of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities import Slice

KNOWN_POSITIONS = 256


class NextTokens(NamedTuple):
    """Of the last positions of each text, at most `KNOWN_POSITIONS`, in the order of the text.

    Attributes:
        token: The most likely next token, `[batch, pos]`.
        lead: By how much its logit exceeds any other's, likewise.
    """

    token: Int[Tensor, "batch pos"]
    lead: Float[Tensor, "batch pos"]

    @classmethod
    @torch.no_grad()
    def of(cls, output: Any) -> NextTokens | None:
        """What a model's output says; None where it holds no logits of two tokens or more."""
        logits = output[0] if isinstance(output, tuple) else output
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[-1] < 2:
            return None
        logits = logits[:, -KNOWN_POSITIONS:]
        token = logits.argmax(-1)
        return cls(token, lead(logits, token))

    def slice(self, batch: Slice) -> NextTokens:
        """Those of some texts."""
        chosen = batch.apply(torch.arange(len(self.token), device=self.token.device)).reshape(-1)
        return NextTokens(self.token[chosen], self.lead[chosen])

    def reread(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch known"]:
        """By how much the same tokens' logits exceed all others in other logits of the last positions.

        Negative where these say something else. On the logits' device; a loaded cache's tokens are on the CPU.
        """
        n = min(logits.shape[1], self.token.shape[1])
        return lead(logits[:, -n:], self.token[:, -n:].to(logits.device))


def lead(logits: Float[Tensor, "batch pos d_vocab"], token: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """By how much a token's logit exceeds any other's: the log of how many times as probable it is."""
    wide, index = logits.float(), token[..., None]
    return wide.gather(-1, index)[..., 0] - wide.scatter(-1, index, -torch.inf).amax(-1)
