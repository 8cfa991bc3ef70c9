"""The case studies, a module each with `run(options) -> dict`."""
