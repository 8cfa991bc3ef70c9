"""One row of attention for several heads, as an inline SVG: where along the text a position reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from jaxtyping import Float
from torch import Tensor

from tl_stream.viz.bins import Bins

_WIDTH, _ROW, _LEFT, _TOP = 1000, 22, 64, 40
_LEAST_DRAWN = 1e-3
_BLUE, _MARK = "#1f4fd8", "#d9480f"


def row_strip(mass: Float[Tensor, "head_index bin"], names: Sequence[str], bins: Bins, marks: Mapping[str, slice]) -> str:
    """A strip a head; the darker a bin, the more probability mass lies on it. Marked parts of the text are framed.

    Args:
        mass: Probability mass of one query on each bin, as `Bins.mass` gives it.
        names: Name of each head.
        bins: How the text is cut.
        marks: Parts of the text to frame: name -> slice of token positions.

    Returns:
        SVG, to be put into an HTML page.

    Raises:
        ValueError: Numbers of names, rows or bins that don't agree.
    """
    if mass.shape != (len(names), len(bins)):
        raise ValueError(f"mass was of shape {tuple(mass.shape)}; expected {(len(names), len(bins))}: names x bins.")
    height = _TOP + _ROW * len(names) + 20
    rows = [_row(mass[i].tolist(), name, _TOP + _ROW * i, bins) for i, name in enumerate(names)]
    frames = [_frame(name, part, bins, len(names)) for name, part in marks.items()]
    axis = [_text(_x(bins, pos), height - 4, str(pos), "middle") for pos in (0, bins.n_tokens // 2, bins.n_tokens)]
    size = f'viewBox="0 0 {_WIDTH} {height}" style="width:100%;max-width:{_WIDTH}px"'
    return f'<svg role="img" {size} font-size="12" font-family="sans-serif">{"".join([*rows, *frames, *axis])}</svg>'


def _x(bins: Bins, pos: int) -> float:
    """Where a token position lies, in the picture's units."""
    return _LEFT + (_WIDTH - _LEFT - 24) * pos / bins.n_tokens


def _row(values: list[float], name: str, y: int, bins: Bins) -> str:
    ground = _box(_LEFT, y, _x(bins, bins.n_tokens) - _LEFT, 'fill="#f1f3f5"')
    cells = [_cell(value, name, y, bins, i) for i, value in enumerate(values) if value >= _LEAST_DRAWN]
    return "".join([_text(_LEFT - 8, y + _ROW - 8, name, "end"), ground, *cells])


def _cell(value: float, name: str, y: int, bins: Bins, index: int) -> str:
    here = bins.tokens(index)
    x = _x(bins, here.start)
    title = f"<title>{escape(name)}, tokens {here.start}-{here.stop - 1}: {value:.3f}</title>"
    return _box(x, y, max(2.0, _x(bins, here.stop) - x), f'fill="{_BLUE}" fill-opacity="{min(value, 1.0):.3f}"', title)


def _frame(name: str, part: slice, bins: Bins, n_rows: int) -> str:
    start, stop = _x(bins, part.start), _x(bins, part.stop)
    middle = (start + stop) / 2
    box = (
        f'<rect x="{start - 2:.1f}" y="{_TOP - 6}" width="{stop - start + 4:.1f}" height="{_ROW * n_rows + 8}" '
        f'fill="none" stroke="{_MARK}" stroke-width="1.5"/>'
    )
    anchor = "end" if middle > 0.9 * _WIDTH else "start" if middle < 0.1 * _WIDTH else "middle"
    return box + _text(middle, _TOP - 12, f"{name} ({part.start}-{part.stop - 1})", anchor, _MARK)


def _box(x: float, y: int, width: float, style: str, content: str = "") -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - 4}" {style}>{content}</rect>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
