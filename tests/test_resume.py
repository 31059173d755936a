"""A run killed with SIGKILL at any moment and resumed equals the uninterrupted one."""

from __future__ import annotations

import csv
import random
import signal
import time

import pytest
import torch
from cpu_processes import AllowCpu
from host_runs import SeedEpochs
from killed_runs import DieAt, RaiseIn, Tally, output_of, run, run_processes, start
from tiny_clip import HAS_LOCAL_DIR, write_model, write_pairs

pytest.importorskip("open_clip_train.main")

PAIRS, BATCH, EPOCHS = 16, 8, 3
FAIR = (
    *("--fair-loss", "--fair-attributes", "sex", "site", "--fair-queue", "4"),
    *("--fair-faulty-sigma", "1", "--fair-noisy-sigma", "1"),
)
IDLE = (
    *("--fair-loss", "--fair-attributes", "sex", "--fair-weight", "0"),
    *("--fair-faulty-sigma", "inf", "--fair-noisy-sigma", "inf"),
)
FREQUENT = ("--save-frequency", "1")
RECENT = ("--save-frequency", "0", "--save-most-recent")
DELETING = (*FREQUENT, "--delete-previous-checkpoint")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert run(["--help"], folder) == 0  # the server is up: what is timed later is a run
    return {
        "folder": folder,
        "model": write_model(folder / "tiny"),
        "train": str(write_pairs(folder, PAIRS, "train")),
        "val": str(write_pairs(folder, 4, "val", seed=1)),
    }


def arguments(data, logs, *more, evaluated=True):
    return [
        *("--train-data", data["train"], "--model", data["model"]),
        *(("--val-data", data["val"]) if evaluated else ()),
        *(("--device", "cpu") if HAS_LOCAL_DIR else ()),  # 2.x has no such flag
        *("--batch-size", str(BATCH), "--epochs", str(EPOCHS), "--workers", "0"),
        *("--warmup", "2", "--lr", "1e-3", "--logs", str(logs), "--name", "run", *more),
    ]


def callbacks(moment=None):
    return DieAt(moment), SeedEpochs(), Tally()


def checkpoints(logs):
    return logs / "run" / "checkpoints"


def load(path):
    """A checkpoint of the host; the oldest host's holds NumPy numbers."""
    return torch.load(path, weights_only=False)


def end_of(logs):
    """The last checkpoint, the state beside it and, where pairs were mined, the flagged."""
    folder = checkpoints(logs)
    checkpoint = load(folder / f"epoch_{EPOCHS}.pt")
    states = torch.load(folder / f"epoch_{EPOCHS}.fair", weights_only=True)
    flagged = [path.read_text() for path in folder.glob(f"flagged_epoch_{EPOCHS}.csv")]
    return checkpoint, states, flagged


def assert_same(first, second, where=""):
    """Equal bit for bit, and of the same types, all the way down."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and first.shape == second.shape, where
        assert first.numpy().tobytes() == second.numpy().tobytes(), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key, value in first.items():
            assert_same(value, second[key], f"{where}[{key!r}]")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for position, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}[{position}]")
    else:
        assert first == second, where


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """How the uninterrupted run ends, and how long it takes."""
    logs = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    assert run(arguments(data, logs, *FAIR, *FREQUENT), data["folder"], None, callbacks()) == 0
    took = time.monotonic() - began
    checkpoint, states, flagged = end_of(logs)
    assert len(flagged) == 1 and len(flagged[0].splitlines()) > 1  # a pair below the header
    tally = states["callbacks"]["Tally"]
    # Saved after the evaluation, and what it says is of every epoch.
    assert tally["batches"].tolist() == [PAIRS // BATCH] * EPOCHS
    assert [epoch for epoch, _ in tally["evaluations"]] == [1, 2, 3]
    assert int(states["callbacks"]["FairTrainingCallback"]["loss"]["miner.epoch"]) == EPOCHS
    return (checkpoint, states, flagged), took


@pytest.mark.parametrize(
    ("saving", "moment"),
    [
        (FREQUENT, "step"),
        (FREQUENT, "half_state"),
        (FREQUENT, "half_checkpoint"),
        (RECENT, "epoch_end"),
        (RECENT, "before_replace"),
        (RECENT, "half_latest"),
        (DELETING, "after_replace"),
        (DELETING, "after_checkpoint"),
        (DELETING, "tidy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_killed_and_resumed_equals_uninterrupted(data, whole, tmp_path, saving, moment):
    command = arguments(data, tmp_path, *FAIR, *saving)
    assert run(command, data["folder"], moment, callbacks(moment)) == -signal.SIGKILL
    folder = checkpoints(tmp_path)
    if moment == "half_checkpoint":  # the host takes it for its latest, and is told by its user
        (folder / "epoch_2.pt").unlink()
    assert run([*command, "--resume", "latest"], data["folder"], None, callbacks()) == 0
    assert_same(end_of(tmp_path), whole[0])
    assert not list(folder.glob("*.tmp"))
    # What is left is what goes with the checkpoints that are left.
    epochs = {load(path)["epoch"] for path in folder.glob("*.pt")}
    assert {int(path.stem.partition("_")[2]) for path in folder.glob("*.fair")} == epochs


def test_pairs_named_by_a_column_killed_and_resumed_equal_uninterrupted(data, tmp_path):
    ends = []
    for name, moment in (("whole", None), ("cut", "step")):
        flags = (*FAIR, *FREQUENT, "--fair-id-key", "pair")
        command = arguments(data, tmp_path / name, *flags)
        if moment:
            status = run(command, data["folder"], moment, callbacks(moment))
            assert status == -signal.SIGKILL
            command += ["--resume", "latest"]
        assert run(command, data["folder"], None, callbacks()) == 0
        ends.append(end_of(tmp_path / name))
    assert_same(*ends)


def test_killed_at_random_moments_until_it_is_done(data, whole, tmp_path):
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    command = arguments(data, tmp_path, *FAIR, *RECENT, "--resume", "latest")
    for _ in range(4):
        process = start(command, data["folder"], None, callbacks())
        process.join(draw.uniform(0, whole[1]))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), f"seed {seed}"
    assert run(command, data["folder"], None, callbacks()) == 0, f"seed {seed}"
    assert_same(end_of(tmp_path), whole[0], f"seed {seed}")


def test_callbacks_alone_are_resumed_too(data, whole, tmp_path):
    command = arguments(data, tmp_path, *RECENT)
    assert run(command, data["folder"], "after_replace", callbacks()) == -signal.SIGKILL
    assert run([*command, "--resume", "latest"], data["folder"], None, callbacks()) == 0
    states = end_of(tmp_path)[1]["callbacks"]
    assert list(states) == ["Tally"]
    assert_same(states["Tally"]["batches"], whole[0][1]["callbacks"]["Tally"]["batches"])
    assert [epoch for epoch, _ in states["Tally"]["evaluations"]] == [1, 2, 3]


def test_the_weights_are_those_of_the_hosts_own_resume(data, tmp_path):
    """In one process the host does not take up its order of the data, nor do we in its place."""
    ends = []
    for name, own, flags in (("host", None, ()), ("ours", (), IDLE)):
        command = arguments(data, tmp_path / name, *FREQUENT, *flags)
        assert run(command, data["folder"], "after_checkpoint", own) == -signal.SIGKILL
        assert run([*command, "--resume", "latest"], data["folder"], None, own) == 0
        ends.append(load(checkpoints(tmp_path / name) / f"epoch_{EPOCHS}.pt"))
    assert_same(*ends)


def test_two_processes_killed_and_resumed_equal_the_uninterrupted(data, tmp_path):
    ends = []
    flags = (*FAIR, *FREQUENT, "--batch-size", "4")
    for name, moment in (("whole", None), ("cut", "after_checkpoint")):
        # 2.x evaluates in the first process by a forward pass that waits for the others.
        command = arguments(data, tmp_path / name, *flags, evaluated=False)
        own = [(AllowCpu(), *callbacks()), (AllowCpu(), *callbacks())]
        if moment:
            statuses = run_processes(command, data["folder"], moment, own)
            assert statuses[0] == -signal.SIGKILL and statuses[1] != 0
            command += ["--resume", "latest"]
        assert run_processes(command, data["folder"], None, own) == [0, 0]
        ends.append(end_of(tmp_path / name))
    assert ends[0][1]["world_size"] == 2
    assert_same(*ends)


def run_sharded(data, logs, count, *more, moment=None, shards=("--fair-shard-memory",)):
    """Run processes that see 8 pairs a step together; return the exit statuses.

    Without a queue: which scores are the newest is a matter of their order in a batch, which goes
    by process.
    """
    command = arguments(
        data, logs, *FAIR, *FREQUENT, *shards, "--batch-size", str(BATCH // count),
        "--precision", "fp32", "--fair-save-pairs", "--fair-queue", "0", "--local-loss",
        "--gather-with-grad", *more, evaluated=False,
    )  # fmt: skip
    own = [(AllowCpu(), *callbacks()) for _ in range(count)]
    return run_processes(command, data["folder"], moment, own)


def pairs_of(folder, epoch=EPOCHS):
    with open(folder / f"pairs_epoch_{epoch}.csv", newline="") as file:
        return {int(row["id"]): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def in_shards(data, tmp_path_factory):
    logs = tmp_path_factory.mktemp("in_shards")
    assert run_sharded(data, logs, 2) == [0, 0]
    return logs


def test_a_memory_in_shards_is_the_whole_memory(data, tmp_path, in_shards):
    assert run_sharded(data, tmp_path, 2, shards=()) == [0, 0]
    whole, parts = pairs_of(checkpoints(tmp_path)), pairs_of(checkpoints(in_shards))
    assert whole == parts and len(whole) == PAIRS
    assert {row["kind"] for row in whole.values()} > {"clean"}
    states = [end_of(logs)[1] for logs in (tmp_path, in_shards)]
    memory = states[0]["callbacks"]["FairTrainingCallback"]["loss"]
    assert states[1]["parts"] == 2
    assert not any(
        name.startswith("miner.") for name in states[1]["callbacks"]["FairTrainingCallback"]["loss"]
    )
    for rank in range(2):
        shard = shards_of(in_shards)[rank]["callbacks"]["FairTrainingCallback"]["miner"]
        for name in ("loss_sum", "visits", "kind", "last_loss"):
            assert torch.equal(shard[name], memory[f"miner.{name}"][rank::2])


def shards_of(logs, epoch=EPOCHS, count=2):
    return [
        torch.load(checkpoints(logs) / f"epoch_{epoch}.fair.{rank}-of-{count}", weights_only=True)
        for rank in range(count)
    ]


def test_killed_in_the_middle_of_a_part_and_resumed_equals_uninterrupted(data, tmp_path, in_shards):
    statuses = run_sharded(data, tmp_path, 2, moment="half_part")
    assert statuses[1] == -signal.SIGKILL and statuses[0] != 0
    folder = checkpoints(tmp_path)
    assert not (folder / "epoch_2.fair").exists() and not (folder / "epoch_2.pt").exists()
    assert run_sharded(data, tmp_path, 2, "--resume", "latest") == [0, 0]
    assert_same(end_of(tmp_path), end_of(in_shards))
    assert_same(shards_of(tmp_path), shards_of(in_shards))
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("count", [4, 1])
def test_shards_are_resumed_by_another_number_of_processes(data, tmp_path, in_shards, count):
    """Four see the pairs that two saw, each image cut at random by another process.

    One, of another order of the pairs, takes the memory up whole.
    """
    checkpoint = str(checkpoints(in_shards) / "epoch_2.pt")
    assert run_sharded(data, tmp_path, count, "--resume", checkpoint) == [0] * count
    found, expected = pairs_of(checkpoints(tmp_path)), pairs_of(checkpoints(in_shards))
    assert found.keys() == expected.keys()
    for pair, row in expected.items():
        assert found[pair]["visits"] == row["visits"] == str(EPOCHS)
        if count == 4:
            mean_loss = float(row["mean_loss"])
            assert float(found[pair]["mean_loss"]) == pytest.approx(mean_loss, rel=0.05)
    parts = list(checkpoints(tmp_path).glob("epoch_3.fair.*"))
    assert len(parts) == (4 if count == 4 else 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_callback_that_raises_in_one_process_stops_them_all(data, tmp_path, rank):
    command = arguments(data, tmp_path, *FAIR, "--batch-size", "4")
    own = [(AllowCpu(), RaiseIn(rank)), (AllowCpu(), RaiseIn(rank))]
    began = time.monotonic()
    statuses = run_processes(command, data["folder"], None, own)
    assert statuses[rank] == 1 and statuses[1 - rank] != 0
    assert time.monotonic() - began < 60  # gloo itself would wait for half an hour
    line = "error: callback RaiseIn failed at batch_end: ValueError: no more of this"
    assert line in output_of(data["folder"], {"RANK": rank}).read_text()
