"""How faithful a sparse run is to the dense model, and what it takes to make it so."""

from tl_stream.fidelity.budget_result import BudgetSearch, Evaluation
from tl_stream.fidelity.budget_search import find_budget

__all__ = ["BudgetSearch", "Evaluation", "find_budget"]
