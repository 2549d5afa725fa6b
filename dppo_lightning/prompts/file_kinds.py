"""What a file or folder is, where it is not what the prompt source reads."""

from __future__ import annotations

from pathlib import Path

MAGIC = {
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it first",
    b"BZh": "is compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed with xz: unpack it first",
    b"PK\x03\x04": "is a zip archive: unpack it first",
    b"PAR1": "is Parquet: read it with ParquetPrompts",
    b"ARROW1": "is an Arrow file: load it with datasets and write it with to_parquet, for ParquetPrompts",
    b"\xff\xfe": "is UTF-16: write it as UTF-8",
    b"\xfe\xff": "is UTF-16: write it as UTF-8",
}
"""How a file begins -> what it is, and what to do."""


def what_it_is(path: str) -> str | None:
    """What a file or folder is, and what to do; None where that is not known, or it cannot be read."""
    folder = Path(path)
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "is a folder of save_to_disk: load it with load_from_disk and write it with to_parquet"
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError:
        return None
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            return what
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return "is a JSON array: write one object a line"
    if text.startswith(b"{"):
        return "is JSON: JsonlPrompts reads it, one object a line"
    return None
