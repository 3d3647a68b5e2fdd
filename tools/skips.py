"""Compare the skips of a run with those that are allowed: ``skips.py FILE``.

FILE is what MAPTENSORS_SKIPS named during the run. tests/skips.txt lists what may be skipped; whatever else
was skipped fails the run.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

ALLOWED = Path(__file__).resolve().parents[1] / "tests" / "skips.txt"


class Allowed(NamedTuple):
    """What may be skipped, by pattern, and where that is expected."""

    file: str
    test: str
    why: str
    where: str


def skip(line: str) -> tuple[str, str, str]:
    """The file, test and reason of a line ``FILE TEST: WHY``."""
    file, _, rest = line.partition(" ")
    test, _, why = rest.partition(": ")
    return file, test, why


def allowed() -> Iterator[Allowed]:
    """The entries of the list: lines below a line in brackets that says where they are expected."""
    where = ""
    for line in map(str.strip, ALLOWED.read_text().splitlines()):
        if line.startswith("["):
            where = line.strip("[]")
        elif line and not line.startswith("#"):
            yield Allowed(*skip(line), where)


def is_so(where: str) -> bool:
    """Whether a place is this one, as far as that can be asked."""
    if where == "not root":
        return os.geteuid() != 0
    return not where.startswith("no ") or shutil.which(where.removeprefix("no ")) is None


def literal(pattern: str) -> str:
    """A pattern in which only ``*`` is special: reasons and parameters have brackets."""
    return pattern.replace("[", "[[]").replace("?", "[?]")


def main() -> int:
    """Print each skip with where it was expected, and fail on the others."""
    path = Path(sys.argv[1])
    skips = sorted(set(path.read_text().splitlines())) if path.exists() else []
    entries, unexpected = [entry for entry in allowed() if is_so(entry.where)], 0
    for line in skips:
        parts = skip(line)
        found = next((e for e in entries if all(map(fnmatchcase, parts, map(literal, e[:3])))), None)
        unexpected += found is None
        print(f"NOT ON THE LIST: {line}" if found is None else f"skipped ({found.where}): {line}")
    if unexpected:
        print(f"{unexpected} skipped that tests/skips.txt does not allow: run them, or list them there")
    else:
        print(f"{len(skips)} skipped, all of them allowed")
    return int(unexpected > 0)


if __name__ == "__main__":
    sys.exit(main())
