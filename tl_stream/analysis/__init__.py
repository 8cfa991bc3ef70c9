"""What Stream is used for: studies of a model on a text, each with a statement of what it is exact for."""

from tl_stream.analysis.attention_flow import flow_names
from tl_stream.analysis.cutting import cut_edges, random_edges
from tl_stream.analysis.flip_result import Flip, FlipRun, Flips
from tl_stream.analysis.flips import find_flips
from tl_stream.analysis.flow_graph import FlowEdge, FlowGraph
from tl_stream.analysis.head_result import HeadScore, HeadScores
from tl_stream.analysis.head_scores import head_scores
from tl_stream.analysis.information_flow import information_flow
from tl_stream.analysis.needle_result import NeedleCell, NeedleGrid
from tl_stream.analysis.needle_study import needle_grid
from tl_stream.analysis.over_squashing import over_squashing
from tl_stream.analysis.patching import patch_by_block
from tl_stream.analysis.patching_result import Effect, PatchEffects
from tl_stream.analysis.path_sums import PathSums
from tl_stream.analysis.receivers import ReceiverHeads, VerticalScores, receiver_heads, vertical_scores
from tl_stream.analysis.resampling import ResamplingImportance, resampling_importance
from tl_stream.analysis.route_comparison import HeadDifference, RouteComparison, compare_routes
from tl_stream.analysis.route_result import Edge, NeedleRoutes, Route
from tl_stream.analysis.routes import needle_routes
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
    "Edge",
    "Effect",
    "Flip",
    "FlipRun",
    "Flips",
    "FlowEdge",
    "FlowGraph",
    "HeadDifference",
    "HeadScore",
    "HeadScores",
    "NeedleCell",
    "NeedleGrid",
    "NeedleRoutes",
    "PatchEffects",
    "PathSums",
    "ReceiverHeads",
    "ResamplingImportance",
    "Route",
    "RouteComparison",
    "Segments",
    "Sentence",
    "Suppression",
    "VerticalScores",
    "compare_routes",
    "cut_edges",
    "find_flips",
    "flow_names",
    "head_scores",
    "information_flow",
    "line_split",
    "needle_grid",
    "needle_routes",
    "over_squashing",
    "paper_split",
    "patch_by_block",
    "random_edges",
    "receiver_heads",
    "resampling_importance",
    "rule_tag",
    "sentence_matrix",
    "sentences",
    "suppression",
    "vertical_scores",
]
