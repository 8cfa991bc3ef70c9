"""Loads a checkpoint folder into any of the hosts, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, overload

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from tl_stream.models import checkpoint
from tl_stream.models.decoder import head_size, rotary_base

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

DEFAULT = "mini"


@overload
def load(
    name: str | Path = ...,
    host: Literal["hooked"] = ...,
    device: str | torch.device = ...,
    dtype: torch.dtype = ...,
) -> HookedTransformer: ...
@overload
def load(
    name: str | Path = ...,
    *,
    host: Literal["bridge"],
    device: str | torch.device = ...,
    dtype: torch.dtype = ...,
) -> TransformerBridge: ...
@overload
def load(
    name: str | Path = ...,
    *,
    host: Literal["hf"],
    device: str | torch.device = ...,
    dtype: torch.dtype = ...,
) -> LlamaForCausalLM: ...
@overload
def load(
    name: str | Path = ..., host: str = ..., device: str | torch.device = ..., dtype: torch.dtype = ...
) -> HookedTransformer | TransformerBridge | LlamaForCausalLM: ...
def load(
    name: str | Path = DEFAULT,
    host: str = "bridge",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HookedTransformer | TransformerBridge | LlamaForCausalLM:
    """The bundled model in evaluation mode, with its tokenizer where the host holds one.

    Args:
        name: a bundled model, or a folder written by `python -m tl_stream.models.train`.
        host: "bridge" for a TransformerBridge, "hooked" for a HookedTransformer (transformer-lens 3.x only), "hf" for
            the transformers model alone (its tokenizer: `load_tokenizer`).
        device: where the weights go.
        dtype: what they are converted to; they are stored as float32.

    Raises ValueError for an unknown name or host and for a checkpoint that does not match its checksums, ImportError
    for "hooked" where transformer-lens has no HookedTransformer.
    """
    match host:
        case "hooked":
            return _hooked(checkpoint.find(name), torch.device(device), dtype)
        case "bridge":
            return _bridge(checkpoint.find(name), torch.device(device), dtype)
        case "hf":
            return _hf(checkpoint.find(name), torch.device(device), dtype)
    raise ValueError(f"host: got {host!r}; expected 'hooked', 'bridge' or 'hf'")


def load_tokenizer(name: str | Path = DEFAULT) -> PreTrainedTokenizerBase:
    """The word-level tokenizer of a model: it prepends BOS by itself, and decoding gives the text back.

    Raises ValueError as `load` does.
    """
    return AutoTokenizer.from_pretrained(checkpoint.find(name), local_files_only=True)


def _hf(folder: Path, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    model: torch.nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return cast(LlamaForCausalLM, model.to(device).eval())


def _bridge(folder: Path, device: torch.device, dtype: torch.dtype) -> TransformerBridge:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder), device=device, dtype=dtype).eval()


def _hooked(folder: Path, device: torch.device, dtype: torch.dtype) -> HookedTransformer:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    except ImportError as error:
        raise ImportError(
            "host='hooked' needs HookedTransformer, which transformer-lens 4 no longer has; "
            "use host='bridge', or install 'transformer-lens>=3.9,<4'"
        ) from error

    source = _hf(folder, device, dtype)
    shape = source.config
    config = HookedTransformerConfig(
        n_layers=shape.num_hidden_layers,
        d_model=shape.hidden_size,
        n_heads=shape.num_attention_heads,
        n_key_value_heads=shape.num_key_value_heads,
        d_head=head_size(shape),
        d_mlp=shape.intermediate_size,
        d_vocab=shape.vocab_size,
        n_ctx=shape.max_position_embeddings,
        act_fn=shape.hidden_act,
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=shape.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=head_size(shape),
        rotary_base=rotary_base(shape),
        rotary_adjacent_pairs=False,
        original_architecture="LlamaForCausalLM",
        model_name=folder.name,
        tokenizer_name=str(folder),
        device=str(device),
        dtype=dtype,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = HookedTransformer(config, tokenizer=tokenizer, default_padding_side="right")
    model.load_state_dict(convert_llama_weights(source, config), strict=False)
    return model.eval()
