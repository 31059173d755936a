"""Results that a change of the house must not change: recorded once, compared to 1e-6.

The oracles stand in the other tests; these cases only say that nothing moved. After a change of
results that is meant, record anew: ``python tests/test_golden.py`` writes golden.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.loss import DistillClipLoss, SigLipLoss
from tiny_clip import HAS_LOCAL_DIR, write_model, write_pairs
from torch import Tensor
from training_runs import arguments, rows_of

from fairclip_losses import BadPairMiner, FairLoss, SinkhornFairnessLoss, sinkhorn_divergence, train
from fairclip_losses.presets import build_fair_loss

RECORDED = Path(__file__).with_name("golden.json")


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _divergence(p: int, blur: float, dim: int, groups: int | None) -> dict[str, Tensor]:
    """Return cost and gradients; ``groups`` rows of weights share the points."""
    draw = _draw(10 * p + dim)
    n = 40
    x = torch.rand(n, dim, generator=draw, dtype=torch.float64).requires_grad_()
    if groups is None:
        y = torch.randn(n + 7, dim, generator=draw, dtype=torch.float64).requires_grad_()
        cost = sinkhorn_divergence(x, y, p=p, blur=blur, tol=1e-10)
    else:
        y = x
        weights = (torch.rand(groups, n, generator=draw) < 0.4).double()
        cost = sinkhorn_divergence(x, x, None, weights, p=p, blur=blur, tol=1e-10)
    cost.sum().backward()
    found = {"cost": cost, "grad_x": x.grad}
    return found if y is x else {**found, "grad_y": y.grad}


def _miner(**options: object) -> dict[str, Tensor]:
    draw = _draw(3)
    pairs = 60
    miner = BadPairMiner(pairs, noisy_sigma=1.5, faulty_sigma=1.2, **options)
    bad = torch.arange(pairs) % 9 == 0
    weights = []
    for _ in range(3):
        for ids in torch.randperm(pairs, generator=draw).split(20):
            losses = 0.3 * torch.rand(20, generator=draw) + 2.0 * bad[ids]
            weights.append(miner(losses, ids))
        miner.end_epoch()
    report = miner.report()
    return {
        "weights": torch.cat(weights),
        "history": torch.from_numpy(report.history),
        "z_score": torch.from_numpy(report.z_score),
        "flagged": torch.from_numpy((report.kind == "faulty") * 1.0 - (report.kind == "noisy")),
    }


def _features(draw: torch.Generator, count: int) -> Tensor:
    # In float64: in float32 the order of the sums would move more than 1e-6 of the gradients.
    return torch.nn.functional.normalize(torch.randn(count, 8, generator=draw).double(), dim=1)


LOSSES = {
    "clip": lambda: open_clip.ClipLoss(),
    "siglip": lambda: SigLipLoss(),
    "coca": lambda: open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0),
    "distill": lambda: DistillClipLoss(),
}


def _model_out(name: str, draw: torch.Generator, ids: Tensor) -> dict[str, Tensor]:
    count = len(ids)
    images = _features(draw, count)
    texts = torch.nn.functional.normalize(images + 0.3 * _features(draw, count), dim=1)
    texts = torch.where((ids % 7 == 0)[:, None], texts.roll(1, 0), texts)
    out = {
        "image_features": images.requires_grad_(),
        "text_features": texts,
        "logit_scale": torch.tensor(10.0, dtype=torch.float64, requires_grad=True),
    }
    if name == "siglip":
        out["logit_bias"] = torch.tensor(-5.0, dtype=torch.float64)
    if name == "distill":
        out |= {f"dist_{side}_features": _features(draw, count) for side in ("image", "text")}
        out["dist_logit_scale"] = torch.tensor(8.0, dtype=torch.float64)
    if name == "coca":
        out["labels"] = torch.randint(0, 11, (count, 5), generator=draw)
        out["logits"] = torch.randn(count, 5, 11, generator=draw).double()
    return out


def _fair_loss(name: str, loss: FairLoss) -> dict[str, Tensor]:
    """Train on nothing for three epochs; return the last batch's dict and gradients."""
    draw = _draw(5)
    pairs, groups = 48, torch.arange(48) % 3
    for _ in range(3):
        for ids in torch.randperm(pairs, generator=draw).split(24):
            out = _model_out(name, draw, ids)
            terms = loss(**out, pair_ids=ids, groups=groups[ids], output_dict=True)
        loss.end_epoch()
    # The published unit knows the batches by their place: this is the epoch's first.
    ids = torch.arange(24)
    out = _model_out(name, draw, ids)
    terms = loss(**out, pair_ids=ids, groups=groups[ids], output_dict=True)
    sum(terms.values()).backward()
    assert loss.last is not None
    return {
        **terms,
        "weights": loss.last.weights,
        "grad_image_features": out["image_features"].grad,
        "grad_logit_scale": out["logit_scale"].grad,
    }


def _own(**options: object) -> FairLoss:
    return FairLoss(
        open_clip.ClipLoss(),
        BadPairMiner(48, noisy_sigma=1.0, faulty_sigma=1.0),
        SinkhornFairnessLoss(p=1, num_groups=3),
        0.3,
        **options,
    )


CASES = {
    **{
        f"divergence p={p} blur={blur} D={dim} groups={groups}": (
            lambda p=p, blur=blur, dim=dim, groups=groups: _divergence(p, blur, dim, groups)
        )
        for p in (1, 2)
        for blur, dim, groups in (
            (0.0, 1, None), (0.0, 1, 3), (0.05, 1, None), (0.05, 1, 3), (0.001, 1, 3),
            (0.1, 2, None),
        )
    },
    "miner mean": lambda: _miner(),
    "miner linear": lambda: _miner(history="linear"),
    "miner density": lambda: _miner(weighting="density"),
    "miner mixture": lambda: _miner(detector="mixture"),
    **{
        f"fair loss {name}": lambda name=name: _fair_loss(
            name,
            build_fair_loss(LOSSES[name](), num_pairs=48, total_epochs=4, num_groups=3),
        )
        for name in LOSSES
    },
    **{
        f"fair loss {preset}": lambda preset=preset: _fair_loss(
            "clip",
            build_fair_loss(
                LOSSES["clip"](), preset=preset, num_pairs=48, total_epochs=4, num_groups=3,
                fairness_weight=0.5,
                miner_options={"noisy_sigma": 0.7, "faulty_sigma": 0.7},
            ),
        )
        for preset in ("paper", "official")
    },
    "fair loss similarity": lambda: _fair_loss("clip", _own(score="similarity")),
    "fair loss by weights": lambda: _fair_loss("clip", _own(normalization="weights")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_nothing_moved(name: str) -> None:
    recorded = json.loads(RECORDED.read_text())[name]
    found = CASES[name]()
    assert found.keys() == recorded.keys()
    for key, values in found.items():
        expected = torch.tensor(recorded[key], dtype=torch.float64)
        torch.testing.assert_close(
            values.detach().double(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()),
            msg=lambda text, key=key: f"{key}: {text}",
        )  # fmt: skip


def _flagged(folder: Path) -> list[dict[str, str]]:
    """Return flagged_epoch_2.csv of a run at learning rate 0, less the file names."""
    data = {"train": str(write_pairs(folder, 40, "train")), "model": write_model(folder / "model")}
    more = ("--csv-separator", "\t", "--lr", "0", "--fair-loss", "--fair-attributes", "sex")
    sigmas = ("--fair-noisy-sigma", "1", "--fair-faulty-sigma", "1", "--fair-warmup-epochs", "1")
    assert train.main(arguments(data, folder / "logs", "run", *more, *sigmas, epochs=2)) == 0
    rows = rows_of(folder / "logs" / "run" / "checkpoints" / "flagged_epoch_2.csv")
    return [{key: value for key, value in row.items() if key != "file"} for row in rows]


@pytest.mark.filterwarnings("default")  # the host warns in its own ways
@pytest.mark.skipif(not HAS_LOCAL_DIR, reason="open_clip 2 draws other weights")
def test_the_same_pairs_are_flagged(tmp_path: Path) -> None:
    recorded, found = json.loads(RECORDED.read_text())["flagged"], _flagged(tmp_path)
    assert len(recorded) > 3
    numbers = ("mean_loss", "z_score")
    for row, expected in zip(found, recorded, strict=True):
        for key, value in expected.items():
            close = pytest.approx(float(value), abs=2e-4) if key in numbers else value
            assert (float(row[key]) if key in numbers else row[key]) == close, key


if __name__ == "__main__":
    golden = {
        name: {key: values.detach().tolist() for key, values in case().items()}
        for name, case in CASES.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        golden["flagged"] = _flagged(Path(folder))
    RECORDED.write_text(json.dumps(golden) + "\n")
