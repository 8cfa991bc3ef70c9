"""Checkpoint folders: where the bundled ones are, and the checksums that go with them."""

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CHECKSUMS = "SHA256SUMS"


def bundled() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{CHECKSUMS}"))


def find(name: str | Path) -> Path:
    """The folder of a bundled model, or `name` itself if it is a checkpoint folder; verified in both cases.

    Raises ValueError for an unknown name, and for files that are missing or not as their SHA-256 checksums say.
    """
    folder = FOLDER / name if name in bundled() else Path(name)
    if not (folder / CHECKSUMS).is_file():
        raise ValueError(
            f"name: {str(name)!r} is neither a bundled model ({', '.join(bundled())}) "
            f"nor a folder written by `python -m tl_stream.models.train` (with a {CHECKSUMS} file)"
        )
    verify(folder)
    return folder


def write_checksums(folder: Path) -> None:
    """Notes the SHA-256 of the checkpoint's files in the folder's SHA256SUMS, as the command sha256sum does."""
    (folder / CHECKSUMS).write_text("".join(f"{_sha256(folder / file)}  {file}\n" for file in FILES))


def verify(folder: Path) -> None:
    """Raises ValueError if a file of the checkpoint is missing or differs from its checksum."""
    for line in (folder / CHECKSUMS).read_text().splitlines():
        expected, file = line.split()
        path = folder / file
        found = _sha256(path) if path.is_file() else "no file"
        if found != expected:
            raise ValueError(
                f"{path}: expected SHA-256 {expected}, found {found}; the checkpoint is damaged: "
                "install tl-stream again, or fetch the folder again (with git: `git checkout` it)"
            )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
