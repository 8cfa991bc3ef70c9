"""Case studies of the analyses on the bundled model, each against the dense model or a known truth.

    python benchmarks/case_studies.py [--only anchors] [--quick] [--json FILE]

Each study is a module of `case_studies_parts` with `run(options)`, which prints its figures and returns them.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path

STUDIES = ("anchors",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STUDIES, nargs="+", default=STUDIES)
    parser.add_argument("--quick", action="store_true", help="shorter and fewer texts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    figures = {}
    for name in options.only:
        figures[name] = import_module(f"case_studies_parts.{name}").run(options)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
