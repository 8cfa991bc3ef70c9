"""The small bundled model: `load` gives it as a HookedTransformer, a TransformerBridge or a Hugging Face model."""

from tl_stream.models.loading import load, load_tokenizer

__all__ = ["load", "load_tokenizer"]
