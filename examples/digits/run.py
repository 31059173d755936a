"""The demo: train a small CLIP on planted data with and without the fair loss, and compare.

    python examples/digits/run.py

For each seed it makes a data set (`make_data.py`), trains twice with the same command line but for
``--fair-loss``, evaluates both on the test split, and writes a report (`report.py`). It uses the
two programs of the package just as a user would; every command is shown as it starts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

from children import ChildError, Command, Job, run_jobs
from make_data import PROMPTS, DataFiles, write_data
from report import write_report

import fairclip_losses

MODEL = Path(__file__).resolve().parent / "vit_tiny"
ATTRIBUTES = ("group", "site")


def seed_folder(output: Path, seed: int) -> Path:
    return output / f"seed-{seed}"


def training(
    folder: Path, data: DataFiles, seed: int, fair: bool, epochs: int, workers: int
) -> Command:
    """Return the training command; `fair` is the only difference between the two runs."""
    name = "fair" if fair else "plain"
    arguments = ["-m", "fairclip_losses.train"]
    arguments += ["--model", f"local-dir:{_short(MODEL)}"]
    arguments += ["--train-data", _short(data.train)]
    arguments += ["--logs", _short(folder), "--name", name, "--seed", str(seed)]
    arguments += ["--epochs", str(epochs), "--batch-size", "64", "--lr", "1e-3", "--warmup", "20"]
    arguments += ["--workers", str(workers), "--device", "cpu", "--precision", "fp32"]
    arguments += ["--save-frequency", "0"]  # the last epoch only
    if fair:
        arguments += ["--fair-loss", "--fair-attributes", *ATTRIBUTES]
        arguments += ["--fair-id-key", "id", "--fair-save-pairs"]
    return Command(
        title=f"seed {seed} {name}",
        arguments=arguments,
        log=folder / f"{name}-train.log",
        produces=folder / name / "checkpoints" / f"epoch_{epochs}.pt",
        epochs=epochs,
    )


def evaluation(train: Command, folder: Path, table: Path, seed: int) -> Command:
    """Return the evaluation command of a trained model."""
    output = train.produces.parent.parent / "evaluation"
    arguments = ["-m", "fairclip_losses.evaluate"]
    arguments += ["--checkpoint", _short(train.produces), "--data", _short(table)]
    arguments += ["--label", "digit", "--prompts", *PROMPTS]
    arguments += ["--attributes", *ATTRIBUTES, "--seed", str(seed), "--output", _short(output)]
    return Command(
        title=train.title + " evaluation",
        arguments=arguments,
        log=folder / f"{output.parent.name}-evaluate.log",
        produces=output / "fairness.json",
    )


def _short(path: Path) -> str:
    """Return the path relative to the working directory where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    output = Path(options.output)
    jobs = []
    for seed in options.seeds:
        print(f"\rmaking the data of seed {seed} ...", end="", flush=True)
        folder = seed_folder(output, seed)
        for part in ("data", "plain", "fair"):  # of an earlier run of this demo
            shutil.rmtree(folder / part, ignore_errors=True)
        data = write_data(folder / "data", seed)
        for fair in (False, True):
            train = training(folder, data, seed, fair, options.epochs, options.workers)
            table = data.test if options.split == "test" else data.val
            jobs.append(Job([train, evaluation(train, folder, table, seed)]))
    print(f"\n{len(jobs)} trainings and evaluations, {options.jobs} at a time", flush=True)
    run_jobs(jobs, options.jobs)
    print("computing the comparison and drawing the report ...", flush=True)
    versions = {name: version(name) for name in ("torch", "open_clip_torch")}
    conditions = {
        "seeds": options.seeds,
        "epochs": options.epochs,
        "split": options.split,
        "seconds": round(time.monotonic() - started, 1),
        "cores": available_cores(),
        "at_once": options.jobs,
        "python": platform.python_version(),
        "versions": {"fairclip_losses": fairclip_losses.__version__, **versions},
        "commands": [command.shown() for job in jobs[:2] for command in job.commands],
    }
    (output / "conditions.json").write_text(json.dumps(conditions, indent=2), encoding="utf-8")
    print(write_report(output))
    print(f"took {time.monotonic() - started:.0f} s on {available_cores()} cores")
    return 0


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="a data set and two runs each")
    add("--epochs", type=int, default=36)
    add("--output", default="build/demo", help="folder for data, runs and report")
    add("--workers", type=int, default=0, help="loader processes of each training")
    add("--jobs", type=int, default=min(4, available_cores()), help="child processes at a time")
    add("--split", choices=("val", "test"), default="test", help="what to evaluate on")
    add("--quick", action="store_true", help="one seed, 3 epochs: to see that everything runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.epochs = options.seeds[:1], 3
    if options.epochs < 1 or options.jobs < 1 or options.workers < 0:
        parser.error("--epochs and --jobs must be at least 1, --workers at least 0")
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        parser.error("--seeds must be different numbers from 0")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    try:
        return run(options)
    except (ChildError, OSError, ValueError) as error:
        print(f"digits demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("digits demo: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
