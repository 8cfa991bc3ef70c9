"""The English text: four fifths a long book on political thought, the rest quotations and a dictionary of slang.

| Debian 12 package | text | licence | used for |
| --- | --- | --- | --- |
| anarchism 15.3-3 | An Anarchist FAQ, 11.6 MB of argumentative prose | GPL 2 or later | training |
| fortunes 1:1.99.1-7.3 | quotations, verse, jokes, 2.5 MB | BSD | training |
| jargon-text 4.4.7-4.1 | the Jargon File 4.4.7, 1.6 MB | public domain | up to "goat file" training, the rest held out |

Only the held-out part is in this repository (`held_out.txt.gz`): what is measured needs no download.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import subprocess
import tarfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

HELD_OUT = Path(__file__).with_name("held_out.txt.gz")
FIRST_HELD_OUT = "\n:goat file:\n"
SHORTEST_PARAGRAPH = 40


@dataclass(frozen=True)
class Package:
    """A Debian package, the SHA-256 of its file, and which of the files in it are text, as a shell pattern."""

    name: str
    version: str
    sha256: str
    pattern: str


ESSAYS = Package(
    "anarchism",
    "15.3-3",
    "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    "./usr/share/doc/anarchism/markdown/*.md.gz",
)
QUOTATIONS = Package(
    "fortunes",
    "1:1.99.1-7.3",
    "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
    "./usr/share/games/fortunes/*[!t8]",
)
JARGON = Package(
    "jargon-text",
    "4.4.7-4.1",
    "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
    "./usr/share/doc/jargon-text/jargon.txt.gz",
)


def training_texts(folder: Path) -> list[str]:
    """All texts but the held-out one; packages that `folder` lacks are downloaded into it with apt-get.

    Raises ValueError for a package whose checksum is wrong, CalledProcessError where apt-get can't download one.
    """
    texts = [unwrap(text) for package in (ESSAYS, QUOTATIONS) for text in read(package, folder)]
    return [*texts, split_jargon(folder)[0]]


def held_out_text() -> str:
    """The text that no model here was trained on."""
    return gzip.decompress(HELD_OUT.read_bytes()).decode()


def write_held_out(folder: Path) -> None:
    """Makes `held_out.txt.gz` anew, from the package in `folder`."""
    HELD_OUT.write_bytes(gzip.compress(split_jargon(folder)[1].encode(), mtime=0))


def split_jargon(folder: Path) -> tuple[str, str]:
    """The Jargon File before and from the first held-out entry."""
    (text,) = read(JARGON, folder)
    before, mark, after = unwrap(text).partition(FIRST_HELD_OUT)
    return before, mark.lstrip() + after


def unwrap(text: str) -> str:
    """One line a paragraph, without Markdown's marks; lists of names and other short paragraphs are left out."""
    text = re.sub(r"\[\s*([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"[*_>#|═]+", " ", text)
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n|\n%\n", text)]
    return "\n".join(line for line in paragraphs if len(line) >= SHORTEST_PARAGRAPH or line.startswith(":"))


def read(package: Package, folder: Path) -> list[str]:
    """The texts in a package, ordered by name."""
    archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", fetch(package, folder)], check=True, capture_output=True).stdout
    texts = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            if member.isfile() and fnmatch(member.name, package.pattern):
                content = files.extractfile(member)
                assert content is not None
                data = content.read()
                texts.append((gzip.decompress(data) if member.name.endswith(".gz") else data).decode("utf-8", "replace"))
    return texts


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, downloaded if it isn't there, verified in any case."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"{package.name}_*.deb")):
        subprocess.run(["apt-get", "download", f"{package.name}={package.version}"], cwd=folder, check=True)
    (path,) = folder.glob(f"{package.name}_*.deb")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{path}: expected SHA-256 {package.sha256} (Debian's {package.name} {package.version}), found {found}; "
            "remove it, and put that version there"
        )
    return path
