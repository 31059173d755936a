"""The study: every method on every condition, paired by seeds, resumable.

    python examples/evidence/study.py            # the headline conditions, seeds 0 to 9
    python examples/evidence/study.py --quick    # one condition, two seeds, few methods
    python examples/evidence/study.py --full     # all conditions and methods: hours

Each training is one line of the results file, so a rerun takes up where the last one stopped. Seeds
of 1000 and up are for development (choosing settings); what is reported is of seeds that chose
nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "trainings.jsonl"
HEADLINE_CONDITIONS = ("demo", "mnist", "clean and fair")
HEADLINE_METHODS = ("plain", "mining", "both", "permuted weights", "true labels")
QUICK_METHODS = ("plain", "both")

Job = tuple[str, str, int, int]  # condition, method, seed, epochs
Key = tuple[str, str, int, int]


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the trainings done so far; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def key_of(result: dict[str, Any]) -> Key:
    """Return what makes a training the same one."""
    return result["condition"], result["method"], result["seed"], result["epochs"]


def run_one(job: Job) -> dict[str, Any]:
    """Train once, in a process of its own, and return its line."""
    import torch
    from data import CONDITIONS
    from methods import METHODS
    from training import Settings, train

    torch.set_num_threads(1)
    condition, method, seed, epochs = job
    chosen = METHODS[method]
    found = train(
        CONDITIONS[condition], seed, chosen.make_loss, chosen.batches, Settings(epochs=epochs)
    )
    return {
        "condition": condition,
        "method": method,
        "seed": seed,
        "epochs": epochs,
        **found,
        "versions": {name: version(name) for name in ("torch", "open_clip_torch")},
        "commit": _commit(),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).resolve().parent
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def run(jobs: list[Job], path: Path, processes: int) -> None:
    """Run the trainings that the file lacks, a line each as they end."""
    from tqdm import tqdm

    done = {key_of(result) for result in read_results(path)}
    left = [job for job in jobs if job not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    workers = multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=50)
    with workers as pool, path.open("a", encoding="utf-8") as file:
        results = pool.imap_unordered(run_one, left)
        for result in tqdm(results, total=len(left), desc="trainings", unit="run"):
            file.write(json.dumps(result) + "\n")
            file.flush()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--conditions", nargs="+", help="default: the headline's")
    add("--methods", nargs="+", help="default: the headline's")
    add("--seeds", type=int, nargs="+", default=list(range(10)))
    add("--epochs", type=int, default=36)
    add("--results", type=Path, default=RESULTS, help="file of one line a training")
    add("--processes", type=int, default=min(4, os.cpu_count() or 1), help="trainings at a time")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one condition, two seeds, two methods")
    size.add_argument("--full", action="store_true", help="all conditions and methods")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for, then draw the tables."""
    from data import CONDITIONS
    from methods import METHODS
    from tables import write_tables

    options = _options(arguments)
    conditions, methods = HEADLINE_CONDITIONS, HEADLINE_METHODS
    if options.full:
        conditions, methods = tuple(CONDITIONS), tuple(METHODS)
    if options.quick:
        conditions, methods = HEADLINE_CONDITIONS[:1], QUICK_METHODS
        options.seeds = options.seeds[:2]
    for kind, given, known in (
        ("condition", options.conditions, CONDITIONS),
        ("method", options.methods, METHODS),
    ):
        for name in given or ():
            if name not in known:
                print(f"no {kind} {name!r}; there are {', '.join(known)}", file=sys.stderr)
                return 2
    jobs = [
        (condition, method, seed, options.epochs)
        for seed in options.seeds
        for condition in options.conditions or conditions
        for method in options.methods or methods
    ]
    run(jobs, options.results, options.processes)
    print(write_tables(options.results))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
