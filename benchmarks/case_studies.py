"""What the analyses show on the bundled model, and whether it is so: each study checks its findings by interventions.

    python benchmarks/case_studies.py [--only STUDY ...] [--quick] [--json FILE]

A study is a function of its own, `study(quick) -> dict` of plain data, in a file of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from case_anchors import anchors
from case_flips import flips
from case_needles import needles
from case_patching import patching
from case_routes import routes
from rich.console import Console

STUDIES: dict[str, Callable[[bool], dict[str, Any]]] = {
    "needles": needles,
    "routes": routes,
    "anchors": anchors,
    "flips": flips,
    "patching": patching,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), help="these studies")
    parser.add_argument("--quick", action="store_true", help="a few texts each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    options = parser.parse_args()
    found = {name: STUDIES[name](options.quick) for name in options.only}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    console = Console()
    for name, result in found.items():
        console.print(f"[bold]{name}[/bold]", result["summary"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
