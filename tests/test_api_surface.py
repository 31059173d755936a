"""The public names, their signatures, and what an import does not do."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch

import fairclip_losses
from fairclip_losses import functional, metrics
from fairclip_losses.integrations import events, open_clip
from fairclip_losses.miners import MinerReport

PUBLIC = {
    "PRESETS",
    "BadPairMiner",
    "FairLoss",
    "SinkhornFairnessLoss",
    "__version__",
    "build_fair_loss",
    "sinkhorn_divergence",
}
NO_DEFAULT = inspect.Parameter.empty


def parameters(callable_):
    """Name -> (default, whether by keyword only)."""
    found = inspect.signature(callable_).parameters.values()
    return {p.name: (p.default, p.kind is p.KEYWORD_ONLY) for p in found}


def test_public_names():
    assert set(fairclip_losses.__all__) == PUBLIC
    assert all(hasattr(fairclip_losses, name) for name in PUBLIC)


def test_sinkhorn_divergence():
    found = parameters(fairclip_losses.sinkhorn_divergence)
    assert list(found)[:4] == ["x", "y", "a", "b"]
    assert found["x"] == found["y"] == (NO_DEFAULT, False)
    assert found["a"] == found["b"] == (None, False)
    assert (found["p"], found["blur"], found["debias"]) == ((2, True), (0.05, True), (True, True))
    assert all(default is not NO_DEFAULT for default, _ in list(found.values())[2:])
    x, weights = torch.rand(5, 1), torch.rand(3, 5)
    assert fairclip_losses.sinkhorn_divergence(x, x, b=weights).shape == (3,)


def test_bad_pair_miner():
    found = parameters(fairclip_losses.BadPairMiner)
    assert next(iter(found)) == "num_pairs" and found["num_pairs"] == (None, False)
    expected = {
        "total_epochs": None,
        "warmup_epochs": 1,
        "noisy_sigma": 3.0,
        "faulty_sigma": 3.0,
        "history": "mean",
        "weighting": "relative",
    }
    assert {name: found[name] for name in expected} == {
        name: (default, True) for name, default in expected.items()
    }
    assert parameters(fairclip_losses.BadPairMiner.forward)["record"] == (None, True)
    miner = fairclip_losses.BadPairMiner()
    weights = miner(torch.rand(3, requires_grad=True), torch.tensor([7, -2, 7]))
    assert weights.shape == (3,) and not weights.requires_grad
    miner.end_epoch()
    report = miner.report()
    fields = [field.name for field in dataclasses.fields(MinerReport)]
    assert fields == ["ids", "visits", "history", "z_score", "kind", "weight"]
    assert all(isinstance(getattr(report, name), np.ndarray) for name in fields)
    assert set(report.kind) <= {"clean", "noisy", "faulty"}


def test_sinkhorn_fairness_loss():
    found = parameters(fairclip_losses.SinkhornFairnessLoss)
    assert all(by_keyword for _, by_keyword in found.values())
    assert found["p"] == (2, True) and "blur" in found
    forward = parameters(fairclip_losses.SinkhornFairnessLoss.forward)
    assert list(forward)[:3] == ["self", "scores", "groups"]
    assert all(default is not NO_DEFAULT for default, _ in list(forward.values())[3:])


def test_fair_loss():
    found = parameters(fairclip_losses.FairLoss)
    assert list(found)[:5] == ["base_loss", "miner", "fairness", "fairness_weight", "score"]
    assert found["miner"] == found["fairness"] == (None, False)
    assert found["score"] == ("loss", False)
    assert found["fairness_weight"][0] is not NO_DEFAULT
    forward = inspect.signature(fairclip_losses.FairLoss.forward).parameters
    assert forward["pair_ids"].default is None and forward["groups"].default is None
    assert forward["output_dict"].default is False
    assert inspect.Parameter.VAR_KEYWORD in {p.kind for p in forward.values()}


def test_metrics():
    for name in (
        "roc_auc",
        "equity_scaled",
        "demographic_parity_difference",
        "equalized_odds_difference",
        "between_group_disparity",
        "fairness_report",
    ):
        assert callable(getattr(metrics, name)) and name in metrics.__all__


def test_integrations():
    assert callable(open_clip.patch) and callable(open_clip.unpatch)
    for name in ("Event", "Callback", "CallbackRegistry", "register"):
        assert hasattr(events, name)


def test_functional_twins():
    for name in (
        "bad_pair_kinds",
        "bad_pair_weights",
        "pair_history",
        "history_statistics",
        "sinkhorn_fairness",
        "group_membership",
        "official_scores",
        "clip_pair_losses",
        "siglip_pair_losses",
        "caption_pair_losses",
        "distill_pair_losses",
        "weighted_mean",
    ):
        assert callable(getattr(functional, name))


def _public_objects():
    modules = [
        fairclip_losses,
        functional,
        metrics,
        events,
        open_clip,
        *(
            sys.modules[f"fairclip_losses.{name}"]
            for name in ("losses", "miners", "pair_terms", "presets", "errors")
        ),
    ]
    seen = {}
    for module in modules:
        for name, value in vars(module).items():
            home = getattr(value, "__module__", None) or ""
            own = home.startswith("fairclip_losses")
            if callable(value) and own and not name.startswith("_"):
                seen[f"{value.__module__}.{value.__qualname__}"] = value
    return seen


@pytest.mark.parametrize(
    "value", [pytest.param(value, id=name) for name, value in sorted(_public_objects().items())]
)
def test_public_objects_are_documented_and_typed(value):
    assert value.__doc__ and value.__doc__.strip()
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not p.empty for p in signature.parameters.values())


IMPORT = """
import json, logging, os, random, signal, sys, warnings
import numpy, torch
import scipy.linalg  # SciPy before 1.12 changes the filters itself

def world():
    return {
        "torch_rng": torch.get_rng_state().tolist(),
        "numpy_rng": repr(numpy.random.get_state()),
        "python_rng": repr(random.getstate()),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filters": repr(warnings.filters),
        "handlers": repr(logging.getLogger().handlers),
        "environment": dict(os.environ),
        "signal": repr(signal.getsignal(signal.SIGINT)),
        "directory": sorted(os.listdir(".")),
        "hook": repr(sys.excepthook),
    }

before = world()
import fairclip_losses
import fairclip_losses.functional, fairclip_losses.metrics, fairclip_losses.integrations.events
import fairclip_losses.integrations.open_clip, fairclip_losses.evaluate, fairclip_losses.train
after = world()
heavy = ("open_clip", "open_clip_train", "matplotlib", "sklearn", "pandas", "torchvision", "wandb")
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "imported": [name for name in heavy if name in sys.modules],
    "callbacks": len(fairclip_losses.integrations.events.default_registry),
}))
"""


def test_import_has_no_side_effect(tmp_path):
    root = str(inspect.getfile(fairclip_losses)).rsplit("/", 2)[0]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip() == '{"changed": [], "imported": [], "callbacks": 0}'
