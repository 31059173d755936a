"""Run open_clip's own tests with the patch in force: ``python tests/upstream_tests.py [FOLDER]``.

pip downloads the source distribution of the installed version into FOLDER (build/upstream): it
holds open_clip's tests. Those of training, webdataset and sharding run with the flags off, where
all must pass as without the patch; those of training then run again with the fair loss on, on a
small table of images. Without the distribution nothing runs, and one line says so.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

NAME = "open_clip_torch"
TRAINING = "tests/test_training_simple.py"
TESTS = (TRAINING, "tests/test_wds.py", "tests/test_num_shards.py")


def download(folder: Path) -> Path | str:
    """Return the unpacked source distribution of the installed version, or why there is none."""
    release = f"{NAME}-{version(NAME)}"
    archive = folder / f"{release}.tar.gz"
    if not archive.exists():
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
             "--no-binary", ":all:", "--dest", str(folder), f"{NAME}=={version(NAME)}"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode or not archive.exists():
            said = done.stderr.strip().splitlines() or [f"no {archive.name}"]
            return f"pip cannot download the source distribution {release}: {said[-1]}"
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    missing = [test for test in TESTS if not (folder / release / test).is_file()]
    return f"{archive.name} holds no {', '.join(missing)}" if missing else folder / release


def run(sources: Path, tests: tuple[str, ...], flags: list[str], fair_flags: list[str]) -> int:
    """Run tests of open_clip's with the patch in force; return pytest's exit status."""
    path = [os.path.dirname(os.path.abspath(__file__)), *filter(None, sys.path)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OPEN_CLIP_FLAGS": shlex.join(flags),
        "FAIR_FLAGS": shlex.join(fair_flags),
    }
    options = ("-q", "-rs", "--tb=short", "-p", "upstream_plugin")
    command = [sys.executable, "-m", "pytest", *options, *tests]
    return subprocess.run(command, cwd=sources, env=environment).returncode


def main(folder: Path) -> int:
    """Download, run, report; return the exit status, 0 where there is nothing to run."""
    from tiny_clip import write_pairs

    folder.mkdir(parents=True, exist_ok=True)
    sources = download(folder)
    if isinstance(sources, str):
        print(f"upstream tests: SKIPPED, nothing was run: {sources}")
        return 0
    flags = ["--precision", os.environ.get("PRECISION") or "fp32"]
    print(
        f"upstream tests: every run with {shlex.join(flags)}: they are runs on the CPU, where "
        "open_clip's default, amp, is float16, slow on most processors (PRECISION=amp keeps it)"
    )
    print(f"upstream tests: {sources.name}, patched, flags off", flush=True)
    status = run(sources, TESTS, flags, [])
    table = str(write_pairs(folder, 16, "pairs"))
    fair_flags = [
        *("--dataset-type", "csv", "--train-data", table, "--val-data", table),
        *("--fair-loss", "--fair-attributes", "sex", "site", "--fair-queue", "4"),
    ]
    print(f"upstream tests: {sources.name}, patched, {shlex.join(fair_flags)}", flush=True)
    return run(sources, (TRAINING,), flags, fair_flags) or status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/upstream").resolve()))
