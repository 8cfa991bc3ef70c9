"""A compact Llama-architecture decoder for training: transformers' LlamaForCausalLM, weight names included, but faster.

transformers takes jumps in `position_ids` for the seams of packed sequences and masks across them; training here needs
such jumps without masks (see `train`), so the forward is written out.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig


def head_size(config: LlamaConfig) -> int:
    """d_head, which a configuration may leave to be inferred."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


def rotary_base(config: LlamaConfig) -> float:
    """The base of the rotary frequencies; Llama's own where a configuration has none."""
    return float((config.rope_parameters or {}).get("rope_theta") or 10000.0)


class Decoder(nn.Module):
    """Rotary positions, grouped-query attention, RMS norm, gated SiLU MLP, untied unembedding.

    Its `state_dict` loads into `LlamaForCausalLM(config)` as it is, and gives the same logits there.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.num_hidden_layers) ** 0.5 if is_output else 0.02)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Causal logits; `positions` are what the rotary embedding sees, and may jump ahead."""
        x = self.model.embed_tokens(tokens)
        rotation = self._rotation(positions)
        for block in self.model.layers:
            x = block(x, rotation)
        return self.lm_head(self.model.norm(x))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        d_head = head_size(self.config)
        exponent = torch.arange(0, d_head, 2, device=positions.device).float() / d_head
        angles = positions[..., None].float() * rotary_base(self.config) ** -exponent
        angles = torch.cat([angles, angles], -1)[:, None]
        return angles.cos(), angles.sin()


class Trunk(nn.Module):
    """Everything but the unembedding; it exists so that the weights have the names that transformers gives them."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Block(nn.Module):
    """Attention and MLP, each on the normed residual stream."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], rotation: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block."""
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (rotate-half)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.d_head = head_size(config)
        n_key_value_heads = config.num_key_value_heads or config.num_attention_heads
        self.group = config.num_attention_heads // n_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.d_head, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, n_key_value_heads * self.d_head, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, n_key_value_heads * self.d_head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.d_head, config.hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], rotation: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the residual stream."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotation).to(v.dtype), rotate(k, rotation).to(v.dtype)
        k, v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(z.transpose(1, 2).flatten(2))


def rotate(
    x: Float[Tensor, "batch head_index pos d_head"], rotation: tuple[Tensor, Tensor]
) -> Float[Tensor, "batch head_index pos d_head"]:
    """Turns dimension i and i + d_head / 2 by the position's angle; `rotation` holds cosines and sines."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the residual stream."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
