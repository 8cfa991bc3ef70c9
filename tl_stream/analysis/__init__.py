"""What sparse runs say about a model: thought anchors (arXiv:2506.19143)."""

from tl_stream.analysis.receivers import ReceiverHeads, VerticalScores, receiver_heads, vertical_scores
from tl_stream.analysis.resampling import ResamplingImportance, resampling_importance
from tl_stream.analysis.segmentation import Sentence, line_split, paper_split, sentences
from tl_stream.analysis.segments import Segments
from tl_stream.analysis.sentence_patterns import sentence_matrix
from tl_stream.analysis.settings import PAPER, AnchorSettings
from tl_stream.analysis.suppression import Suppression, suppression
from tl_stream.analysis.tags import TAGS, rule_tag

__all__ = [
    "PAPER",
    "TAGS",
    "AnchorSettings",
    "ReceiverHeads",
    "ResamplingImportance",
    "Segments",
    "Sentence",
    "Suppression",
    "VerticalScores",
    "line_split",
    "paper_split",
    "receiver_heads",
    "resampling_importance",
    "rule_tag",
    "sentence_matrix",
    "sentences",
    "suppression",
    "vertical_scores",
]
