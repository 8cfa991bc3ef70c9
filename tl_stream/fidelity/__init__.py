"""How near sparse runs come to the dense model, and what it takes to bring them there."""

from tl_stream.fidelity.budget_result import BudgetSearch, Evaluation
from tl_stream.fidelity.budget_search import find_budget
from tl_stream.fidelity.distribute import distribute
from tl_stream.fidelity.report import fidelity
from tl_stream.fidelity.result import Fidelity, HeadFidelity, LayerFidelity, OutputFidelity

__all__ = [
    "BudgetSearch",
    "Evaluation",
    "Fidelity",
    "HeadFidelity",
    "LayerFidelity",
    "OutputFidelity",
    "distribute",
    "fidelity",
    "find_budget",
]
