"""A small language model of English for the benchmarks: its text, its training data and its weights."""
