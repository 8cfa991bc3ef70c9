"""How near sparse runs come to the dense model."""

from tl_stream.fidelity.report import fidelity
from tl_stream.fidelity.result import Fidelity, HeadFidelity, LayerFidelity, OutputFidelity

__all__ = ["Fidelity", "HeadFidelity", "LayerFidelity", "OutputFidelity", "fidelity"]
