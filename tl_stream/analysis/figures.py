"""Plotly figures of sentences against sentences, and of a number for each sentence."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor


def sentence_heatmap(
    values: Float[Tensor, "down across"], labels: tuple[Sequence[str], Sequence[str]], title: str, axes: tuple[str, str]
) -> go.Figure:
    """`values[i, j]` with i down and j across; labels appear under the pointer. `labels` and `axes`: down, across."""
    names = [[[down, across] for across in labels[1]] for down in labels[0]]
    hover = f"{axes[0]} %{{customdata[0]}}<br>{axes[1]} %{{customdata[1]}}<br>%{{z:.4g}}<extra></extra>"
    heatmap = go.Heatmap(
        z=values.double().cpu().numpy(), customdata=names, hovertemplate=hover, colorscale="Viridis", hoverongaps=False
    )
    figure = go.Figure(heatmap)
    figure.update_layout(title=title, template="plotly_white", width=760, height=720)
    figure.update_xaxes(title=f"{axes[1]} sentence", range=[-0.5, len(labels[1]) - 0.5], constrain="domain")
    figure.update_yaxes(title=f"{axes[0]} sentence", range=[len(labels[0]) - 0.5, -0.5], constrain="domain")
    return figure
