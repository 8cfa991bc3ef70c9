"""The `tl-stream` command."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from tl_stream import __version__, demo

WRONG, REFUSED, INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 where it succeeded, 1 where the dense model answered wrong, 2 where it can't be done as asked, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    disable_progress_bar()  # transformers' own, which would mix with ours
    try:
        with _progress() as progress, redirect_stdout(io.StringIO()):  # stdout is for the result alone
            result = demo.run(arguments.tokens, arguments.depth, arguments.seed, arguments.output, progress=progress)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"tl-stream: error: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("tl-stream: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(result.to_dict()))
    else:
        _show(result)
    if result.answer_dense == result.expected:
        return 0
    print(
        f"tl-stream: error: the dense model answered {result.answer_dense!r}; expected {result.expected!r}. The bundled model "
        "answers nearly all such texts right: most likely something is wrong with this installation. Run the tests.",
        file=sys.stderr,
    )
    return WRONG


def _parser() -> _Parser:
    parser = _Parser(prog="tl-stream", description="Sparse attention tracing for TransformerLens.")
    parser.add_argument("--version", action="version", version=f"tl-stream {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    what = "find a needle in a long text, densely and sparsely"
    command = commands.add_parser("demo", help=what, description=demo.__doc__)
    command.add_argument("--tokens", type=int, default=4096, help="length of the text (default: %(default)s)")
    command.add_argument("--depth", type=float, default=0.5, help="of the needle, 0 to 1 (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the text (default: %(default)s)")
    command.add_argument(
        "-o", "--output", type=Path, default=Path("tl_stream_demo.html"), metavar="FILE",
        help="the HTML page to write (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """To be told of each step: a bar on stderr where that is a terminal, else a line a step."""
    console, total = Console(stderr=True), len(demo.STEPS)
    if not console.is_terminal:
        yield lambda step: print(f"[{demo.STEPS.index(step) + 1}/{total}] {step}", file=sys.stderr, flush=True)
        return
    columns = (SpinnerColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task("load the model", total=total)
        yield lambda step: bar.update(shown, description=step, completed=demo.STEPS.index(step))


def _show(result: demo.DemoResult) -> None:
    console = Console()
    figures = Table(show_header=False, box=None)
    for name, value in demo.figures(result):
        figures.add_row(name, value)
    header, *rows = demo.heads_table(result)
    title = "Attention on the needle: 1st answer token / extreme of all"
    heads = Table(*header, title=title, title_justify="left")
    for row in rows:
        heads.add_row(*row)
    console.print(figures, "", heads, "", sep="\n")
    print(f"Written: {result.html}")


if __name__ == "__main__":
    sys.exit(main())
