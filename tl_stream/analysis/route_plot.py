"""Routes as a figure: positions from left to right, layers from bottom to top."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from tl_stream.analysis.route_result import NeedleRoutes, Route

_WIDEST = 6.0
_COLOURS = ("#1f4fd8", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#0b7285")


def plot(routes: NeedleRoutes, tokens: Sequence[str] | None = None) -> go.Figure:
    """A line a route, the wider the more it carries. Only positions that routes pass have a place, in order.

    Args:
        routes: What to plot.
        tokens: The text's tokens, shown beside their positions.

    Raises:
        ValueError: No routes, or fewer tokens than the text has up to the target.
    """
    if not routes.routes:
        raise ValueError("There is no route to plot; expected at least one. Raise `follow` in needle_routes.")
    if tokens is not None and len(tokens) <= routes.target_pos:
        raise ValueError(f"tokens were {len(tokens)}; expected one for each position, up to {routes.target_pos} at least.")
    stops = [_stops(route, routes.target_pos, routes.n_layers) for route in routes.routes]
    positions = sorted({position for path in stops for position in path})
    place = {position: i for i, position in enumerate(positions)}
    figure = go.Figure()
    most = routes.routes[0].score
    for i, (route, path) in enumerate(zip(routes.routes, stops, strict=True)):
        heads = {edge.layer: f"L{edge.layer}H{edge.head}" for edge in route.edges}
        figure.add_scatter(
            x=[place[position] for position in path],
            y=list(range(len(path))),
            mode="lines+markers",
            line={"width": max(1.0, _WIDEST * route.score / most), "color": _COLOURS[i % len(_COLOURS)]},
            marker={"size": 7},
            opacity=0.75,
            name=f"{route.score:.1%} {' '.join(heads.values())}",
            hovertext=[f"position {position}, read by {heads.get(layer, 'none')}" for layer, position in enumerate(path)],
        )
    named = [str(position) if tokens is None else f"{position} {tokens[position].strip()}" for position in positions]
    figure.update_xaxes(title="position", tickvals=list(place.values()), ticktext=named)
    levels = list(range(routes.n_layers + 1))
    figure.update_yaxes(
        title="residual stream", tickvals=levels, ticktext=[f"before layer {i}" for i in levels[:-1]] + ["output"]
    )
    title = f"Routes from {routes.source.start}-{routes.source.stop - 1} to {routes.target_pos}, exact for {routes.exact_for}"
    figure.update_layout(title=title, template="plotly_white", legend_title="share of the output's stream")
    return figure


def _stops(route: Route, target: int, n_layers: int) -> list[int]:
    """Where a route is before each layer, and at the end."""
    read = {edge.layer: edge for edge in route.edges}
    path = [target]
    for layer in reversed(range(n_layers)):
        path.append(read[layer].key_pos if layer in read else path[-1])
    return path[::-1]
