"""`tl-stream demo`: the bundled model finds a needle in a long text, and shows which heads read it."""

from tl_stream.demo.job import STEPS, run
from tl_stream.demo.report import figures, heads_table
from tl_stream.demo.result import DemoResult, HeadReading

__all__ = ["STEPS", "DemoResult", "HeadReading", "figures", "heads_table", "run"]
