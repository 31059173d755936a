"""Fair training on webdataset shards, end to end on open_clip's real training program."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from killed_runs import run_two_processes
from PIL import Image
from tiny_clip import write_model
from tiny_shards import (
    DAMAGES,
    RACES,
    attributes_of,
    hashed,
    number_in,
    picture,
    read_shards,
    write_shards,
)
from training_runs import (
    BATCH,
    EPOCHS,
    FIRM_STEPS,
    IDLE,
    SeedEpochs,
    StopBefore,
    Visits,
    arguments,
    assert_close_weights,
    assert_remembered,
    assert_same,
    one_line,
    pairs_of,
    registered,
    saved_loss,
    weights,
)

from fairclip_losses import train

program = pytest.importorskip("open_clip_train.main")
open_clip_data = pytest.importorskip("open_clip_train.data")

# open_clip's own warnings (no accelerator to pin memory for, and such) are not ours to fix.
pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

SIZES = (17, 16, 15)  # no multiples of the batch: each pass over a worker's shards leaves some out
PAIRS = sum(SIZES)
FAIR = ("--fair-loss", "--fair-attributes", "race=Asian,Black,White", "gender")
OR_LABELS = "or labels given as --fair-attributes race=LABEL,LABEL,..."
BOOK = {"race": list(RACES), "gender": ["0", "1"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return {
        "tiny": folder / "tiny",
        "model": write_model(folder / "tiny"),
        "train": write_shards(folder / "whole", SIZES),
        "folder": folder / "whole",
    }


def streamed(data, logs, name, *more, epochs=EPOCHS):
    samples = ("--train-num-samples", str(PAIRS))
    return arguments(data, logs, name, *samples, *more, epochs=epochs)


class Recorder(Visits):
    """What the loss is given with each image too."""

    def __init__(self):
        super().__init__()
        self.given = []

    def on_loss_end(self, state):
        super().on_loss_end(state)
        inputs = state.loss_inputs
        ids, groups = inputs["pair_ids"].tolist(), inputs["groups"].tolist()
        numbers = [number_in(image, state.preprocess[0]) for image in state.batch[0]]
        self.given += zip(numbers, ids, groups, strict=True)


@pytest.fixture
def record():
    with registered(Recorder()) as callback:
        yield callback


def warnings_of(run):
    lines = (run / "out.log").read_text().splitlines()
    return [line for line in lines if "WARNING | Fair loss" in line]


def assert_given_as_in_the_shards(given, folder, book=BOOK, id_of=lambda pair: pair["id"]):
    pairs = read_shards(folder)
    assert given
    for number, pair_id, groups in given:
        member = pairs[number]["json"]
        said = [(str(member[name]), labels) for name, labels in book.items()]
        codes = [labels.index(word) if word in labels else -1 for word, labels in said]
        assert (pair_id, groups) == (id_of(pairs[number]), codes)


@pytest.fixture(scope="module")
def fair_run(data, tmp_path_factory):
    """One run with two workers, labels and integer codes, which several tests look at."""
    logs = tmp_path_factory.mktemp("fair")
    flags = ("--fair-faulty-sigma", "1", "--fair-noisy-sigma", "1", "--fair-save-pairs")
    argv = streamed(data, logs, "run", *FAIR, *flags, "--workers", "2", "--fair-queue", "4")
    with registered(Recorder()) as callback:
        assert train.main(argv) == 0
    return logs / "run", callback


def test_the_loss_is_given_the_ids_and_groups_of_the_pairs_it_sees(fair_run, data):
    _, record = fair_run
    assert len(record.given) == EPOCHS * PAIRS
    assert_given_as_in_the_shards(record.given, data["folder"])


def test_a_pair_is_seen_and_remembered_as_often_as_open_clip_streams_it(fair_run):
    folder, record = fair_run
    times = {len(losses) for visits in record.epochs for losses in visits.values()}
    # A worker with one shard of 15 to 17 pairs goes round it again for its third batch; the one
    # with two shards comes to its third batch before it has seen all of them.
    assert {1, 2} <= times
    assert all(len(visits) < PAIRS for visits in record.epochs)
    assert_remembered(pairs_of(folder.parent, "run"), record.visits)


def test_reports_say_where_a_pair_is_and_the_log_the_rates_of_its_groups(fair_run, data):
    folder, record = fair_run
    pairs = {pair["id"]: pair for pair in read_shards(data["folder"]).values()}
    log = (folder / "out.log").read_text().splitlines()
    rates = [line for line in log if "flag rate" in line]
    for epoch, line in zip(range(EPOCHS), rates, strict=True):
        everything = pairs_of(folder.parent, "run", epoch + 1)
        flagged = pairs_of(folder.parent, "run", epoch + 1, "flagged")
        assert flagged and flagged == [row for row in everything if row["kind"] != "clean"]
        for row in everything:
            pair, told = pairs[int(row["id"])], ("", "", "", "")
            if int(row["id"]) in record.epochs[epoch]:
                member = pair["json"]
                gender = "" if member["gender"] == -1 else str(member["gender"])
                told = (pair["shard"], pair["key"], member["race"] or "", gender)
            assert (row["shard"], row["key"], row["race"], row["gender"]) == told
        for label in RACES:
            of_label = [row["kind"] != "clean" for row in everything if row["race"] == label]
            assert f"race={label} {np.mean(of_label):.1%}" in line
    # Labels and codes are kept, and nothing is said of pairs that lack nothing.
    assert json.loads((folder / "fair_codebook.json").read_text()) == BOOK
    assert not warnings_of(folder)


def test_resampled_data_sets_whose_shards_and_keys_are_named_alike(data, tmp_path, record):
    urls = [write_shards(tmp_path / name, (BATCH, BATCH)) for name in ("cc", "laion")]
    both = {**data, "train": "::".join(urls)}
    flags = ("--dataset-resampled", "--train-data-upsampling-factors", "1::2", "--fair-save-pairs")
    assert train.main(streamed(both, tmp_path, "run", *FAIR, *flags)) == 0
    assert_remembered(pairs_of(tmp_path, "run"), record.visits)
    names = {}
    for folder in ("cc", "laion"):
        for number, pair in read_shards(tmp_path / folder).items():
            names[hashed(f"{folder}/{pair['shard']}", pair["key"])] = number
    assert len(names) == 4 * BATCH
    assert all(names[pair_id] == number for number, pair_id, _ in record.given)
    assert len({pair_id for _, pair_id, _ in record.given}) > 2 * BATCH


# ------------------------------ what samples lack


def lacking(number):
    member = attributes_of(number)
    if number % 6 == 1:
        return None
    if number % 6 == 2:
        del member["race"]
    if number % 6 == 3:
        member["gender"] = None
    if number % 6 == 5:
        del member["uid"]
    return member


def test_what_samples_lack_is_said_once_with_the_count(data, tmp_path, record):
    texts = {"member": lacking, "caption": lambda n: "\n" if n % 6 == 4 else f"picture number {n}"}
    lacks = {**data, "train": write_shards(tmp_path / "shards", SIZES, **texts)}
    flags = (*FAIR, "--fair-id-key", "uid", "--workers", "2")
    assert train.main(streamed(lacks, tmp_path, "run", *flags)) == 0
    numbers = [number % 6 for number, _, _ in record.given[:PAIRS]]
    first, rare, warning = warnings_of(tmp_path / "run")
    assert "captions are empty (first of sample " in first
    assert "race=White (7 of 48 pairs, 1.2 a batch); add --fair-queue 8, " in rare
    for part in (
        f"of {PAIRS} pairs in epoch 0, {numbers.count(1)} have no json member",
        f"{numbers.count(5)} have no id under 'uid' (named by shard and key instead)",
        f"{numbers.count(2)} have no key 'race'",
        f"{numbers.count(4)} have no caption (trained as empty text)",
    ):
        assert part in warning
    pairs = read_shards(tmp_path / "shards")
    for number, pair_id, (race, gender) in record.given:
        assert number % 6 not in (1, 5) or pair_id == pairs[number]["id"]
        assert number % 6 not in (1, 2) or race == -1
        assert number % 6 not in (1, 3) or gender == -1


def test_a_value_that_is_no_group_stops_the_training(data, tmp_path, capsys):
    """Where the first look does not reach it: of four shards it leaves out the second."""

    def member(number):
        return {"race": "Other" if number == BATCH + 3 else 1}

    shards = write_shards(tmp_path / "shards", (BATCH,) * 4, member=member)
    flags = ("--fair-loss", "--fair-attributes", "race", "--workers", "2")
    argv = streamed({**data, "train": shards}, tmp_path, "run", *flags)
    assert train.main(argv) == 1
    where = "error: shard 00001.tar, sample 0003: key 'race' of the json member: expected a code "
    assert one_line(capsys).endswith(f"{where}from 0 to 1, {OR_LABELS}, got 'Other'")
    flags = ("--fair-attributes", "race=Asian,1,*", "--name", "again")
    assert train.main([*argv, *flags]) == 0


# ------------------------------ resume


def test_a_resumed_run_equals_the_uninterrupted_one(data, tmp_path, registered, monkeypatch):
    # open_clip shuffles samples by the clock; without that its order follows from the seed.
    monkeypatch.setattr(open_clip_data.wds, "shuffle", lambda **options: None)
    flags = (*FAIR, "--fair-faulty-sigma", "1", "--fair-queue", "4")
    registered(SeedEpochs())
    assert train.main(streamed(data, tmp_path, "whole", *flags)) == 0
    stop = registered(StopBefore(1))
    assert train.main(streamed(data, tmp_path, "cut", *flags)) == 130
    stop.epoch = None
    assert train.main(streamed(data, tmp_path, "cut", *flags, "--resume", "latest")) == 0
    whole, cut = (saved_loss(tmp_path, name) for name in ("whole", "cut"))
    assert "miner.memory.table_ids" in whole
    assert_same(whole, cut)
    assert_same(weights(tmp_path, "whole"), weights(tmp_path, "cut"))
    assert_same(*(pairs_of(tmp_path, name, kind="flagged") for name in ("whole", "cut")))


def test_resuming_with_other_shards_is_refused_and_goes_on_with_a_fresh_state(
    data, tmp_path, capsys
):
    assert train.main(streamed(data, tmp_path, "run", *FAIR, epochs=1)) == 0
    fewer = {**data, "train": write_shards(tmp_path / "fewer", SIZES[:2])}
    flags = (*FAIR, "--resume", "latest", "--fair-save-pairs")
    again = streamed(fewer, tmp_path, "run", *flags, epochs=2)
    assert train.main(again) == 2
    line = one_line(capsys)
    assert "--train-data 3 shards" in line and "--fair-fresh-state" in line
    assert train.main([*again, "--fair-fresh-state"]) == 0
    rows = pairs_of(tmp_path, "run", 2)
    assert {row["shard"] for row in rows} == {"00000.tar", "00001.tar"}


def own_id(pair):
    uid = pair["json"]["uid"]
    return uid if isinstance(uid, int) else hashed(uid)


def test_shards_may_be_dropped_where_pairs_have_their_own_ids(data, tmp_path, record):
    flags = (*FAIR, "--fair-id-key", "uid", "--fair-save-pairs")
    assert train.main(streamed(data, tmp_path, "run", *flags, epochs=1)) == 0
    before = pairs_of(tmp_path, "run", 1)
    assert_given_as_in_the_shards(record.given, data["folder"], id_of=own_id)
    fewer = {**data, "train": write_shards(tmp_path / "fewer", SIZES[:2])}
    again = streamed(fewer, tmp_path, "run", *flags, "--resume", "latest", epochs=2)
    assert train.main(again) == 0
    after = pairs_of(tmp_path, "run", 2)
    visits = {row["id"]: int(row["visits"]) for row in after}
    assert all(visits[row["id"]] >= int(row["visits"]) for row in before)
    assert sum(visits.values()) == 2 * PAIRS


# ------------------------------ several processes


def test_two_processes_share_findings_and_memory(data, tmp_path):
    folder, pairs = tmp_path / "shards", 4 * BATCH

    def member(number):
        return None if number % 8 == 3 else {"race": "Other" if number > 24 else number % 2}

    shards = write_shards(folder, (BATCH,) * 4, member=member)
    flags = ("--fair-loss", "--fair-attributes", "race=0,1,Other", "--fair-save-pairs")
    more = ("--batch-size", "4", "--train-num-samples", str(pairs))
    argv = arguments({**data, "train": shards}, tmp_path, "run", *flags, *more, epochs=2)
    assert run_two_processes(argv, data["tiny"].parent, None, ()) == [0, 0]
    expected = {pair["id"]: pair for pair in read_shards(folder).values()}
    rows = pairs_of(tmp_path, "run", 2)
    assert {int(row["id"]) for row in rows} == set(expected)
    for row in rows:
        pair = expected[int(row["id"])]
        race = str(pair["json"]["race"]) if pair["json"] else ""
        assert (row["shard"], row["key"], row["race"]) == (pair["shard"], pair["key"], race)
        assert int(row["visits"]) == 2
    (warning,) = warnings_of(tmp_path / "run")
    assert f"of {pairs} pairs in epoch 0, {pairs // 8} have no json member" in warning


# ------------------------------ wrong input


OTHER = ("--dataset-type", "webdataset", "--train-data")
ZORK = "zork://bucket/00000.tar"
FIRST = "shard 00000.tar, sample 0000: key 'race' of the json member: expected "


@pytest.mark.parametrize(
    ("member", "flags", "message"),
    [
        (attributes_of, ("gender", "gendre"), "no key 'gendre', only 'race', 'gender', 'uid'"),
        (attributes_of, ("gender", "--fair-id-key", "id"), "--fair-id-key id: "),
        (attributes_of, ("gender", "--fair-id-key", "race"), "expected 64-bit integers or strings"),
        (attributes_of, ("gender", "--fair-id-key", "gender"), "expected each id once"),
        (attributes_of, ("race",), f"{FIRST}a code from 0 to 63, {OR_LABELS}, got 'Asian'"),
        (lambda number: {"race": number + 0.5}, ("race",), "expected a code from 0 to 63, or"),
        (lambda number: {"race": 64}, ("race",), "LABEL,LABEL,..., got 64"),
        (lambda number: {"race": None}, ("race",), "race=LABEL,LABEL,..., got no known value"),
        (attributes_of, ("race=asian,black",), "expected one of 'asian', 'black', got 'Asian'"),
        (attributes_of, ("race=asian,*",), "expected one of 'asian', got none, but 'Asian', "),
        (attributes_of, ("race=Asian,,White",), "stands for an unknown value"),
        (attributes_of, ("race=Asian,Black", "gender"), "expected one of 'Asian', 'Black', got 'W"),
        (lambda number: [number], ("race",), "have no json member"),
        (
            lambda number: b"{",
            ("race",),
            "expected samples with a caption (txt), an image (jpg, jpeg, png or webp) and no json "
            "member that is no JSON, got none",
        ),
        (lambda number: b"[" * 10**5, ("race",), "that is no JSON, got none"),
        (attributes_of, ("gender", *OTHER, __file__), "cannot read the shard"),
        (attributes_of, ("gender", *OTHER, ZORK), f"cannot read the shard {ZORK}: "),
        (
            lambda number: {"uid": number % 9, "race": 0},
            ("race", "--fair-id-key", "uid"),
            "expected each id once, got 9 of them more than once (0, 1, 2)",
        ),
    ],
)
def test_wrong_shards_stop_before_the_run_with_one_line(
    data, tmp_path, capsys, member, flags, message
):
    broken = {**data, "train": write_shards(tmp_path / "shards", SIZES, member=member)}
    assert train.main(streamed(broken, tmp_path, "bad", *FAIR[:2], *flags)) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "bad").exists()


def test_a_url_is_streamed_and_other_values_than_the_labels_may_be_unknown(data, tmp_path, record):
    """A command's output stands for remote storage."""
    single = {**data, "train": f"pipe:cat {data['folder']}/00000.tar"}
    flags = ("--fair-loss", "--fair-attributes", "race=Asian,Black,*", "--dataset-type")
    assert train.main(streamed(single, tmp_path, "run", *flags, "webdataset", epochs=1)) == 0
    assert_given_as_in_the_shards(record.given, data["folder"], {"race": ["Asian", "Black"]})
    assert any(attributes_of(number)["race"] == "White" for number, _, _ in record.given)
    assert not warnings_of(tmp_path / "run")


def test_what_cannot_be_read_is_named_and_left_out_as_upstream_does(data, tmp_path):
    """In shards that are looked at before the run, the first among them, and in others."""

    def draw(number):
        if number < 60:  # the seventh shard begins there
            return picture(number)
        file = io.BytesIO()
        Image.fromarray(np.full((32, 32), 4000, "uint16")).save(file, "png")
        return file.getvalue()[: 40 if number == 63 else None]

    shards, folder = write_shards(tmp_path / "shards", (10,) * 7, draw=draw), tmp_path / "shards"
    for shard, damaged in enumerate(DAMAGES.values()):
        path = folder / f"0000{shard}.tar"
        path.write_bytes(damaged(path.read_bytes()))
    # The one worker takes 48 pairs, and so passes over all shards.
    argv = streamed({**data, "train": shards}, tmp_path, "run", *FAIR, "--workers", "1", epochs=1)
    assert train.main(argv) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    named = set(re.findall(r"Handling webdataset error .*/(0000\d.tar)'", log))
    assert named == {f"0000{shard}.tar" for shard in range(len(DAMAGES))}
    where = "shard 00006.tar, sample 0003, member .png"
    assert re.search(rf"Handling webdataset error .*, '{where}'\)\)\. Ignoring", log)
    assert set(re.findall("sample ([0-9]+), member", log)) == {"0003"}
    (deep,) = (line for line in warnings_of(tmp_path / "run") if "grey values" in line)
    assert re.search(r"shard 00006.tar, sample 000\d: the image has grey values", deep)


def test_without_the_flag_shards_train_as_upstream(data, tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip_data.wds, "shuffle", lambda **options: None)
    for name, main, flags in (
        ("upstream", program.main, ()),
        ("ours", train.main, ()),
        ("idle", train.main, (*FAIR, *IDLE)),
    ):
        assert not main(streamed(data, tmp_path, name, *FIRM_STEPS, *flags, epochs=1))
    plain = weights(tmp_path, "upstream", 1)
    assert_same(plain, weights(tmp_path, "ours", 1))
    assert_close_weights(plain, weights(tmp_path, "idle", 1))
