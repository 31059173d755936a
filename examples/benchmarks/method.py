"""How the benchmarks measure: warm-up, interleaved rounds, medians and quartiles, conditions."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "scipy", "geomloss", "POT")


def conditions() -> dict[str, object]:
    """Return what a reader needs to judge or repeat the figures."""
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "fairclip_losses")),
        "date": time.strftime("%Y-%m-%d"),
    }


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 9, most_seconds: float = 20.0
) -> dict[str, dict[str, Any]]:
    """Time each run once a round, in turn, so that what slows the machine slows them all.

    The first round warms up and is not counted. Each run stops after ``most_seconds`` of its own
    (three times at least, once if a single time is longer than that). ``cpu_median_s`` is the
    processor time of all threads, which other jobs on the machine lengthen less; ``all_s`` and
    ``cpu_all_s`` are the times round by round, for `paired`.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            spent = sum(times[name])
            if spent > most_seconds or (spent > most_seconds / 3 and len(times[name]) >= 3):
                continue
            start, worked = time.perf_counter(), time.process_time()
            run()
            elapsed, worked = time.perf_counter() - start, time.process_time() - worked
            if turn > 0 or elapsed > most_seconds / 3:
                times[name].append(elapsed)
                busy[name].append(worked)
    return {
        name: _summary(taken)
        | {"cpu_median_s": statistics.median(busy[name])}
        | {"all_s": taken, "cpu_all_s": busy[name]}
        for name, taken in times.items()
    }


def paired(times: Mapping[str, dict[str, Any]], name: str, base: str) -> dict[str, float]:
    """Return what a run takes of another's time, both taken in the same round: median, quartiles.

    What slows a whole round falls out of such ratios.
    """
    found = {}
    for kind in ("all_s", "cpu_all_s"):
        pairs = zip(times[name][kind], times[base][kind], strict=False)
        low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4, method="inclusive")
        prefix = "cpu_" if kind.startswith("cpu") else ""
        found |= {f"{prefix}ratio": middle, f"{prefix}low": low, f"{prefix}high": high}
    return found


def save(name: str, question: str, rows: list[dict[str, object]], where: dict[str, object]) -> Path:
    """Write one run's figures as one JSON file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(
        json.dumps({"question": question, "conditions": where, "rows": rows}, indent=1) + "\n"
    )
    return path


def _summary(taken: list[float]) -> dict[str, float]:
    if len(taken) < 2:
        return {"median_s": taken[0], "iqr_s": 0.0, "times": len(taken)}
    low, _, high = statistics.quantiles(taken, n=4, method="inclusive")
    return {"median_s": statistics.median(taken), "iqr_s": high - low, "times": len(taken)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
