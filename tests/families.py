"""Small random models of every family of decoders, booted as TransformerBridge."""

from __future__ import annotations

import functools
import tempfile
from typing import Any
from unittest import mock

import torch
import transformers
from architectures import FAMILIES, VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

__all__ = ["FAMILIES", "boot", "build", "tokens"]

_LENGTHS = ("n_ctx", "max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@functools.cache
def folder() -> str:
    """A folder with a word-level tokenizer."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    path = tempfile.mkdtemp()
    tokenizer.save_pretrained(path)
    return path


def build_hf(name: str, dtype: torch.dtype = torch.float32, n_ctx: int | None = None) -> Any:
    """The Hugging Face model of a family, with weights large enough for attention to be far from uniform."""
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**_settings(name, n_ctx))
    config._experts_implementation = "eager"  # the others take no float64
    make = getattr(transformers, family.model)._from_config if family.model else AutoModelForCausalLM.from_config
    torch.manual_seed(0)
    return _far_from_uniform(make(config, attn_implementation="eager").to(dtype).eval())


def build(name: str, dtype: torch.dtype = torch.float32, n_ctx: int | None = None) -> Any:
    """A bridge around a small random model of a family."""
    family = FAMILIES[name]
    if family.config == "native":
        bridge = TransformerBridge.boot_native(_settings(name, n_ctx), device="cpu", dtype=dtype)
        _far_from_uniform(bridge.original_model)
    else:
        bridge = boot(build_hf(name, dtype, n_ctx), family.architecture)
    if family.compatibility:
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge.eval()


def boot(model: Any, architecture: str | None = None) -> TransformerBridge:
    """A bridge around a Hugging Face model, under another architecture's name or its own."""
    model.config.architectures = [architecture or type(model).__name__]
    model.config.save_pretrained(folder())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder())
    # For a model of images and text TransformerLens would pip install torchvision, and with it another torch.
    with mock.patch("subprocess.check_call", side_effect=RuntimeError("nothing is installed in tests")):
        return TransformerBridge.boot_transformers(
            folder(), hf_model=model.eval(), tokenizer=tokenizer, dtype=model.dtype, device="cpu"
        )


def tokens(length: int = 61, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _settings(name: str, n_ctx: int | None) -> dict[str, Any]:
    settings = {**FAMILIES[name].base, **FAMILIES[name].settings}
    return settings if n_ctx is None else _of_length(settings, n_ctx)


def _of_length(settings: dict[str, Any], n_ctx: int) -> dict[str, Any]:
    nested = {"text_config": _of_length(settings["text_config"], n_ctx)} if "text_config" in settings else {}
    return {**settings, **{key: n_ctx for key in _LENGTHS if key in settings}, **nested}


def _far_from_uniform(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.15)
    return model
