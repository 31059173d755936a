"""How many files of the package does a reader open to follow one computation?

    python examples/benchmarks/files_that_run.py

Counts the files in which a function runs, importing and building aside; exits with status 1 where
there are more than may be. CUDA: tensors without values that say that they lie on such a device. Of
the patch integrations/ alone is counted: what it calls is in the other rows.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch._subclasses.fake_tensor import FakeTensorMode

import fairclip_losses
from fairclip_losses import sinkhorn_divergence, train

PACKAGE = Path(fairclip_losses.__file__).parent


def files_that_run(work: Callable[[], object]) -> list[str]:
    """Return the package's files of which a function is called."""
    files = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        # Without this flag it is the body of a module or a class, which runs when it is imported.
        if event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            files.add(frame.f_code.co_filename)

    sys.setprofile(note)
    work()
    sys.setprofile(None)
    paths = [Path(file) for file in files]
    return sorted(str(p.relative_to(PACKAGE)) for p in paths if p.is_relative_to(PACKAGE))


def loss_step() -> list[str]:
    loss = fairclip_losses.build_fair_loss(ClipLoss(), num_pairs=64, num_groups=3)
    image, text = torch.randn(2, 64, 8).requires_grad_()
    out = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(10.0)}
    ids = torch.arange(64)
    return files_that_run(lambda: loss(**out, pair_ids=ids, groups=ids % 3).backward())


def miner() -> list[str]:
    unit, losses, ids = fairclip_losses.BadPairMiner(64), torch.rand(64), torch.arange(64)
    return files_that_run(lambda: (unit(losses, ids), unit.end_epoch(), unit.report()))


def divergence(p: int, blur: float, device: str) -> list[str]:
    with FakeTensorMode() if device != "cpu" else contextlib.nullcontext():
        x = torch.rand(512, 1, device=device, requires_grad=True)
        b = torch.rand(3, 512, device=device)
        return files_that_run(lambda: sinkhorn_divergence(x, x, b=b, p=p, blur=blur))


def patched_run() -> list[str]:
    sys.path.insert(0, str(PACKAGE.parent / "tests"))
    from tiny_clip import write_model, write_pairs

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()) as log:
        model, table = write_model(Path(name) / "tiny"), write_pairs(Path(name), 32, "train")
        argv = f"--model {model} --train-data {table} --logs {name} --name run --epochs 1"
        argv += " --batch-size 8 --workers 0 --device cpu --fair-loss --fair-attributes sex"
        files = files_that_run(lambda: train.main(argv.split()) and sys.exit(log.getvalue()))
    return [file for file in files if file.startswith("integrations")]


def main() -> int:
    for module in pkgutil.walk_packages([str(PACKAGE)], "fairclip_losses."):
        with contextlib.suppress(ImportError):  # Triton's kernel, where there is no Triton
            importlib.import_module(module.name)
    rows: list[tuple[str, int | None, list[str]]] = [
        ("a FairLoss step", 11, loss_step()),
        ("the miner", None, miner()),
        ("the divergence, p=1 blur=0, CPU", 4, divergence(1, 0.0, "cpu")),
        ("the divergence, p=1 blur=0, CUDA", 4, divergence(1, 0.0, "cuda")),
        ("the divergence, p=2 blur=0.05, CPU", 8, divergence(2, 0.05, "cpu")),
        ("the divergence, p=2 blur=0.05, CUDA", 8, divergence(2, 0.05, "cuda")),
        ("the patch on a CSV run", 12, patched_run()),
    ]
    print("| | files | at most | which |\n|---|---|---|---|")
    for title, most, files in rows:
        print(f"| {title} | {len(files)} | {most or ''} | {', '.join(files)} |")
    return int(any(most is not None and len(files) > most for _, most, files in rows))


if __name__ == "__main__":
    sys.exit(main())
