"""What a sentence of a reasoning trace does, by its wording."""

from __future__ import annotations

import re

TAGS = (
    "problem_setup",
    "plan_generation",
    "fact_retrieval",
    "active_computation",
    "result_consolidation",
    "uncertainty_management",
    "final_answer_emission",
    "self_checking",
)
"""The eight tags of Bogdan et al. 2025 (arXiv:2506.19143)."""

_RULES = (
    ("final_answer_emission", r"final answer|answer is|\\boxed|in the end\b.*\b(has|is|are)\b.*[^?]$"),
    ("uncertainty_management", r"^(wait|hmm|but wait|actually)\b(?!.*\b(check|verify)\b)|not sure|confus|maybe|perhaps"),
    ("self_checking", r"\b(double[- ]?check|check|verify|make sure|be sure|was right|is right|confirm)\b"),
    ("problem_setup", r"\?$|\b(problem|question|given that|we need to find|asked)\b"),
    ("plan_generation", r"\b(next|first|let me|let us|let's|we need|i need|i should|plan|try|approach|going to|will)\b"),
    ("result_consolidation", r"\b(in total|overall|to sum up|in summary|altogether|putting .* together)\b"),
    ("active_computation", r"[=+*/]|\b(so|thus|therefore|hence|which means|gives|add|subtract|times|minus|plus)\b"),
)
_COMPILED = tuple((tag, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for tag, pattern in _RULES)


def rule_tag(sentence: str) -> str:
    """One of `TAGS`, by key words; the first rule that fits decides, and `fact_retrieval` is what fits none.

    The paper has a language model do this. These rules are a stand-in that needs none, right about clear wordings only.
    """
    return next((tag for tag, pattern in _COMPILED if pattern.search(sentence.strip())), "fact_retrieval")
