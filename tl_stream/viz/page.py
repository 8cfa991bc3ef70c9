"""One HTML file that needs no network: text, tables, and circuitsvis's views with its script inlined."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from circuitsvis.utils.render import RenderedHTML

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; }
th, td { padding: 3px 14px 3px 0; text-align: left; border-bottom: 1px solid #e5e5e5; }
"""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        heading: Its heading, plain text.
        text: A paragraph under it, plain text.
        body: Rows of a table (the first is its header), HTML such as `row_strip`'s SVG, or a circuitsvis view.
    """

    heading: str
    text: str
    body: Sequence[Sequence[str]] | str | RenderedHTML


def check_writable(path: Path) -> Path:
    """The file that `path` names (symbolic links followed), once it is certain that it can be written.

    Raises:
        ValueError: It can't: no such folder, no right to write there, or something that isn't a file.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise ValueError(f"output: {path} exists and is no file; name another file")
    try:
        beside = _beside(target)
        beside.touch(exist_ok=False)
        beside.unlink()
        if target.exists():
            target.open("a").close()
    except OSError as error:
        raise ValueError(f"output: {path} can't be written ({error.strerror}); name another file") from None
    return target


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page. It appears at `path` whole or not at all.

    Raises:
        ValueError: `path` can't be written.
    """
    target = check_writable(path)
    beside = _beside(target)
    try:
        beside.write_text(page(title, sections), encoding="utf-8")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def page(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head>",
            f"<body><h1>{escape(title)}</h1>",
            *(_section(part) for part in sections),
            "</body></html>\n",
        ]
    )


def _section(part: Section) -> str:
    return f"<section><h2>{escape(part.heading)}</h2><p>{escape(part.text)}</p>{_body(part.body)}</section>"


def _body(body: Sequence[Sequence[str]] | str | RenderedHTML) -> str:
    if isinstance(body, RenderedHTML):
        return body.local_src
    return body if isinstance(body, str) else _table(body)


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *rest = rows
    lines = [_table_row(header, "th"), *(_table_row(row, "td") for row in rest)]
    return f"<table>{''.join(lines)}</table>"


def _table_row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")
