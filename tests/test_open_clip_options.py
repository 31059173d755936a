"""Precision, compilation and the other options of open_clip's trainer with the fair loss on."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from tiny_clip import HAS_LOCAL_DIR, write_data
from training_runs import (
    BATCH,
    IDLE,
    arguments,
    assert_remembered,
    pairs_of,
    registered,
    weights,
)

from fairclip_losses import train
from fairclip_losses.integrations.events import Callback

pytest.importorskip("open_clip_train.main")

# open_clip's own warnings (no accelerator to pin memory for, and such) are not ours to fix.
pytestmark = pytest.mark.filterwarnings("default")

PAIRS, EPOCHS = 16, 2
FAIR = ("--fair-loss", "--fair-attributes", "sex", "site")
ACTIVE = ("--fair-weight", "0.5", "--fair-faulty-sigma", "0.5", "--fair-noisy-sigma", "0.5")

# open_clip 2 knows autocast on CUDA alone: on a CPU its amp and amp_bf16 compute in float32.
AUTOCASTS = HAS_LOCAL_DIR


class Witness(Callback):
    """Each pair's losses from the logits by a plain loop, and what the options did to the run."""

    def __init__(self):
        self.visits, self.steps, self.dtypes, self.norms = {}, [], set(), []
        self.state = self.first = None

    def on_epoch_start(self, state):
        self.state = state
        if state.epoch:
            return
        model = getattr(state.model, "_orig_mod", state.model)
        self.first = {key: value.detach().clone() for key, value in model.state_dict().items()}
        if state.scaler is not None:  # its own start is too large for this model: it skips steps
            state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 1024.0})

    def on_loss_end(self, state):
        self.steps.append({name: float(value.detach()) for name, value in state.losses.items()})
        image, text, scale = (
            state.loss_inputs[name].detach()
            for name in ("image_features", "text_features", "logit_scale")
        )
        logits = scale * image @ text.T
        self.dtypes.add(logits.dtype)
        rows, columns = logits.double().tolist(), logits.T.double().tolist()
        for k, pair in enumerate(state.loss_inputs.get("pair_ids", torch.empty(0)).tolist()):
            there, back = (math.log(sum(map(math.exp, m[k]))) - m[k][k] for m in (rows, columns))
            self.visits.setdefault(pair, []).append((there + back) / 2)

    def on_batch_end(self, state):
        gradients = [p.grad.float().norm() for p in state.model.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(gradients).norm()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), PAIRS)


@pytest.fixture
def trained(data, tmp_path, monkeypatch):
    """Train under flags; return the weights at the end and what the callback saw."""

    def run(name, *flags):
        with registered(Witness()) as witness:
            assert train.main(arguments(data, tmp_path, name, *flags, epochs=EPOCHS)) == 0
        return weights(tmp_path, name, EPOCHS), witness

    # Traced as ever, and run without a C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return run


def moved(weights, witness, prefix=""):
    """Names of the weights under a prefix that training changed."""
    return {
        key
        for key, value in weights.items()
        if key.startswith(prefix) and not torch.equal(value, witness.first[key])
    }


def low_precision(dtype):
    def check(weights, witness):
        expected = dtype if AUTOCASTS else torch.float32
        assert witness.dtypes == {expected}
        assert {v.dtype for v in weights.values() if v.is_floating_point()} == {torch.float32}

    return check


def stored_as(dtype):
    def check(weights, witness):
        assert witness.dtypes == {dtype}
        assert dtype in {value.dtype for value in weights.values()}

    return check


def clipped(weights, witness):
    assert witness.norms == pytest.approx([0.01] * len(witness.norms), rel=1e-3)


def scaled(weights, witness):
    assert bool(witness.state.scaler.state_dict()) == AUTOCASTS


def checkpointed_and_dropped(weights, witness):
    assert witness.state.model.visual.transformer.grad_checkpointing
    assert witness.state.model.visual.patch_dropout.prob == 0.5


def image_locked(weights, witness):
    assert not moved(weights, witness, "visual.")
    assert "token_embedding.weight" in moved(weights, witness)


def text_locked(weights, witness):
    # open_clip 2 locks only text towers of Hugging Face.
    assert bool(moved(weights, witness, "text.")) != HAS_LOCAL_DIR
    assert moved(weights, witness, "visual.")


def compiled(weights, witness):
    assert type(witness.state.model).__name__ == "OptimizedModule"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


CLIP = ("--grad-clip-norm", "0.01")
DROP = ("--grad-checkpointing", "--force-patch-dropout", "0.5")
LOCK_TEXT = ("--lock-text", "--lock-text-freeze-layer-norm") if HAS_LOCAL_DIR else ()
OPTIONS = [
    (("--precision", "amp", *CLIP), [low_precision(torch.float16), clipped, scaled]),
    (("--precision", "amp_bf16", *DROP), [low_precision(torch.bfloat16), checkpointed_and_dropped]),
    (("--precision", "pure_bf16", "--lock-image"), [stored_as(torch.bfloat16), image_locked]),
    # open_clip's own --eps of 1e-8 is 0 in float16: there the first step divides by it.
    (
        ("--precision", "fp16", "--eps", "1e-4", *LOCK_TEXT, "--force-custom-text"),
        [stored_as(torch.float16), text_locked],
    ),
    (("--precision", "fp32", "--torchcompile"), [compiled]),
]


@pytest.mark.parametrize(("flags", "checks"), OPTIONS)
def test_an_option_of_open_clip_works_with_the_fair_loss(trained, tmp_path, flags, checks):
    plain, upstream = trained("plain", *flags)
    _, witness = trained("idle", *FAIR, *IDLE, *flags)
    rounding = 1e-5 if "fp32" in flags else 0.02
    for ours, theirs in zip(witness.steps, upstream.steps, strict=True):
        assert ours["contrastive_loss"] == pytest.approx(theirs["contrastive_loss"], rel=rounding)
        assert ours["fairness_loss"] == 0

    fair, witness = trained("fair", *FAIR, *ACTIVE, "--fair-save-pairs", *flags)
    for check in checks:
        check(fair, witness)
    assert len(witness.steps) == EPOCHS * PAIRS // BATCH
    assert all(math.isfinite(value) for step in witness.steps for value in step.values())
    assert any(not torch.equal(value, plain[key]) for key, value in fair.items())
    assert all(torch.isfinite(value).all() for value in fair.values())
    # The memory holds each pair's loss before the weights, to float32's rounding.
    assert_remembered(pairs_of(tmp_path, "fair", EPOCHS), witness.visits)
    assert {len(losses) for losses in witness.visits.values()} == {EPOCHS}
