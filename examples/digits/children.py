"""Run the training and evaluation commands as child processes, with a progress line."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

# open_clip's log line: "Train Epoch: 3 [1024/1080 (95%)] ... Loss: 2.8123 (2.9)".
_EPOCH = re.compile(r"Train Epoch: (\d+) \[.*\((\d+)%\)\].* Loss: ([0-9.einfa+-]+)")
# What a child does before it can show anything (imports, building the model), told in epochs.
_START_UP = 4.0


class ChildError(RuntimeError):
    """A child process failed; the message is one line with the path of its log."""


@dataclass(frozen=True)
class Command:
    """One child process: arguments after `python`, what it must leave behind, where it logs."""

    title: str
    arguments: Sequence[str]
    log: Path
    produces: Path
    epochs: int = 0  # 0: not a training

    @property
    def work(self) -> float:
        return _START_UP + self.epochs

    def shown(self) -> str:
        """Return the command as a person would type it, wrapped."""
        options: list[str] = []
        for argument in self.arguments:
            # An option and its first value stay together.
            joined = options and options[-1].startswith("-") and " " not in options[-1]
            if joined and not argument.startswith("-"):
                options[-1] += " " + shlex.quote(argument)
            else:
                options.append(shlex.quote(argument))
        lines = ["OMP_NUM_THREADS=1 python"]
        for option in options:
            if len(lines[-1]) + len(option) > 94:
                lines.append("   ")
            lines[-1] += " " + option
        return " \\\n".join(lines)


@dataclass
class Job:
    """Commands that follow each other, and how far they are."""

    commands: Sequence[Command]
    done: float = 0.0
    status: str = ""

    @property
    def work(self) -> float:
        return sum(command.work for command in self.commands)


@dataclass
class Progress:
    """One line that is rewritten on a terminal, and repeated every few seconds elsewhere."""

    jobs: Sequence[Job]
    stream: TextIO = field(default_factory=lambda: sys.stdout)
    started: float = field(default_factory=time.monotonic)
    _last: float = -1e9

    def line(self) -> str:
        share = sum(job.done for job in self.jobs) / sum(job.work for job in self.jobs)
        elapsed = time.monotonic() - self.started
        parts = [f"{share:4.0%}  {_clock(elapsed)}"]
        if 0.05 < share < 1:
            parts.append(f"about {_clock(elapsed / share - elapsed)} to go")
        return " | ".join(parts + [job.status for job in self.jobs if job.status])

    def show(self) -> None:
        if self.stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\x1b[K{self.line()[:width]}")
        elif time.monotonic() - self._last >= 10.0:
            self._last = time.monotonic()
            self.stream.write(self.line() + "\n")
        self.stream.flush()

    def say(self, text: str) -> None:
        """Write lines that stay, above the progress line."""
        self.stream.write(("\r\x1b[K" if self.stream.isatty() else "") + text + "\n")
        self.stream.flush()


def run_jobs(jobs: Sequence[Job], at_once: int) -> None:
    """Run every job, `at_once` at a time; each command is shown once, when it starts.

    Raises:
        ChildError: a command failed; the others have been stopped.
    """
    progress = Progress(jobs)
    children: set[subprocess.Popen[str]] = set()
    stop = threading.Event()
    messages: list[str] = []

    def run(job: Job) -> None:
        for command in job.commands:
            if stop.is_set():
                return
            messages.append(f"\n{command.shown()}\n")
            base = job.done
            job.status = f"{command.title}: starting"

            def follow(line: str, command: Command = command, base: float = base) -> None:
                seen = _EPOCH.search(line)
                if seen:
                    epoch, percent, loss = int(seen[1]), int(seen[2]), float(seen[3])
                    job.done = base + _START_UP + epoch + percent / 100
                    job.status = f"{command.title}: epoch {epoch + 1}/{command.epochs}"
                    job.status += f", loss {loss:.2f}"

            _run_command(command, follow, children, stop)
            job.done = base + command.work
        job.status = ""

    with ThreadPoolExecutor(at_once) as pool:
        waiting: set[Future[None]] = {pool.submit(run, job) for job in jobs}
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                while messages:
                    progress.say(messages.pop(0))
                progress.show()
                for future in finished:
                    future.result()
        except BaseException:
            stop.set()
            for child in list(children):
                child.terminate()
            progress.say("")
            raise
    progress.say(progress.line())


def _run_command(
    command: Command,
    follow: Callable[[str], None],
    children: set[subprocess.Popen[str]],
    stop: threading.Event,
) -> None:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with command.log.open("w", encoding="utf-8") as log:
        log.write(command.shown() + "\n\n")
        last = ""
        with subprocess.Popen(
            [sys.executable, *command.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        ) as child:
            children.add(child)
            if stop.is_set():  # set while this one was being started
                child.terminate()
            assert child.stdout is not None  # it is a pipe
            for line in child.stdout:
                log.write(line)
                log.flush()
                if "error" in line.lower() or not last:
                    last = line.strip() or last
                follow(line)
        children.discard(child)
        code = child.returncode
    if stop.is_set():
        return
    if code != 0:
        raise ChildError(f"{command.title} failed (exit {code}): {last}; its log: {command.log}")
    if not command.produces.exists():
        raise ChildError(f"{command.title} left no {command.produces}; its log: {command.log}")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
