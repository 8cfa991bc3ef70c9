"""Pictures of sparse patterns, by block: small enough for a browser however long the text."""

from tl_stream.viz.bins import Bins
from tl_stream.viz.heads import heads_view
from tl_stream.viz.page import Section, write_page
from tl_stream.viz.strip import row_strip

__all__ = ["Bins", "Section", "heads_view", "row_strip", "write_page"]
