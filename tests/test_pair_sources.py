"""Sources of pairs: rows through loaders, ids and codes of samples, what an epoch has seen."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_clip import write_data, write_model, write_pairs
from tiny_shards import DAMAGES, hashed, write_shards
from torch.utils.data import DataLoader, TensorDataset
from training_runs import (
    BATCH,
    Visits,
    arguments,
    assert_remembered,
    one_line,
    registered,
    rows_of,
)

from fairclip_losses import train
from fairclip_losses.data import CodeBook, Table, encode_attributes, write_table
from fairclip_losses.data.groups import GroupCoder
from fairclip_losses.errors import UsageError
from fairclip_losses.integrations import webdataset_pairs as module
from fairclip_losses.integrations.fair_training import pair_source
from fairclip_losses.integrations.flags import split_flags
from fairclip_losses.integrations.pair_reports import attribute_column, count_flagged, flag_rates
from fairclip_losses.integrations.webdataset_pairs import (
    FIELDS,
    GROUPS,
    LACKS,
    PairStage,
    SeenPairs,
    codes_of,
    hashed_id,
    insert_stage,
    own_id,
    shard_names,
)

pytest.importorskip("open_clip_train.main")

# open_clip's own warnings (no accelerator to pin memory for, and such) are not ours to fix.
pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")


def open_clip_arguments(**changes):
    """open_clip's arguments, as far as sources read them."""
    values = dict.fromkeys(("train_data", "train_num_samples", "train_data_upsampling_factors"))
    values |= {"dataset_type": "auto", "dataset_resampled": False, "workers": 0}
    values |= {"csv_separator": "\t", "csv_img_key": "filepath", "csv_caption_key": "title"}
    values |= {"batch_size": 4, "accum_freq": 1}
    return SimpleNamespace(**{**values, **changes})


def options(*argv):
    return split_flags(["--fair-loss", *argv])[0]


# ------------------------------ rows

SEXES = ("", "f", "m")


def test_rows_come_through_several_workers_in_every_epoch(tmp_path):
    table = write_pairs(tmp_path, 22, "train")
    args = open_clip_arguments(train_data=str(table))
    flags = ("--fair-attributes", "sex", "site", "--fair-id-key", "pair")
    source = pair_source(args, options(*flags))
    content = torch.arange(22)
    loader = DataLoader(
        TensorDataset(content, content), batch_size=4, shuffle=True, num_workers=2,
        persistent_workers=True, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    source.attach(loader)
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    orders = []
    for _ in range(3):
        seen = []
        for batch in loader:
            (images, _), pairs = source.take(batch)
            seen += images.tolist()
            of = [rows[row] for row in images.tolist()]
            assert pairs.ids.tolist() == [int(row["pair"]) for row in of]
            codes = [[SEXES.index(row["sex"]) - 1, int(row["site"])] for row in of]
            assert pairs.groups.tolist() == codes
        assert sorted(seen) == list(range(22))  # the last batch is a partial one
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]


def test_labels_given_for_a_table_are_its_groups(tmp_path):
    args = open_clip_arguments(train_data=str(write_pairs(tmp_path, 22, "train")))
    source = pair_source(args, options("--fair-attributes", "sex=m,f,x", "site"))
    assert source.codebook.labels == {"sex": ("m", "f", "x"), "site": ("0", "1")}
    with pytest.raises(UsageError, match=r"'sex': expected one of 'm', 'x', got 'f' in \d+ rows"):
        pair_source(args, options("--fair-attributes", "sex=m,x"))
    some = pair_source(args, options("--fair-attributes", "sex=m,x,*", "site"))
    assert some.codebook.labels == {"sex": ("m", "x"), "site": ("0", "1")}
    males = [0 if code == 0 else -1 for code in source.codes[:, 0].tolist()]
    assert some.codes[:, 0].tolist() == males and set(males) == {0, -1}
    assert torch.equal(some.codes[:, 1], source.codes[:, 1])
    with pytest.raises(UsageError, match="column 'sex': expected groups, got no known value in 22"):
        pair_source(args, options("--fair-attributes", "sex=x,y,*"))


def test_empty_captions_and_a_group_alone_are_remarks_with_counts_and_the_way_on(tmp_path):
    path = write_pairs(tmp_path, 22, "train")
    header, *lines = path.read_text().splitlines()
    rows = [[*line.split("\t"), str(row % 2 * 2 - 1)] for row, line in enumerate(lines)]
    for row, caption in ((3, "NA"), (7, ""), (8, " "), (9, "null"), (10, "NAN")):
        rows[row][2] = caption
    write_table(path, [*header.split("\t"), "Male"], rows, "\t")
    args = open_clip_arguments(train_data=str(path))
    captions, group = pair_source(args, options("--fair-attributes", "Male")).remarks
    assert captions.startswith(f"{path}: 4 of 22 captions are empty or missing marks such as NA")
    assert "(column 'title', first in row 4)" in captions
    assert group.startswith("attribute 'Male': one known group alone, '1' (11 of 22 rows, 11 unkn")
    assert group.endswith("give the labels: Male=-1,1")
    source = pair_source(args, options("--fair-attributes", "Male=-1,1"))
    assert source.remarks == (captions,)
    assert source.codes[:, 0].tolist() == [row % 2 for row in range(22)]


def test_the_first_pairs_of_shards_show_empty_captions_and_a_group_alone(tmp_path):
    shards = write_shards(
        tmp_path, (4, 4), member=lambda n: {"Male": n % 2 * 2 - 1},
        caption=lambda n: " " if n in (2, 5) else f"picture number {n}",
    )  # fmt: skip
    args = open_clip_arguments(train_data=shards, train_num_samples=8)
    group, captions = pair_source(args, options("--fair-attributes", "Male")).remarks
    assert ": attribute 'Male': one known group alone, '1' (4 of 8 rows, 4 unknown): " in group
    assert group.endswith("give the labels: Male=-1,1")
    assert ": the first pairs of 2 shards: 2 of 8 captions are empty " in captions
    assert "(first of sample 0002)" in captions
    assert pair_source(args, options("--fair-attributes", "Male=-1,1")).remarks == (captions,)
    write_shards(tmp_path, (40, 40), member=lambda n: {"age": n % 30})
    args.train_num_samples = 80
    (many,) = pair_source(args, options("--fair-attributes", "age")).remarks
    assert "'age': 30 groups in 80 rows, more than a batch can hold ('20' 2, '21' 2, " in many


def test_an_attributes_column_in_a_report_has_a_name_of_its_own():
    names = ["sex", "visits", "attribute_visits", "attribute_sex", "attribute_attribute_visits"]
    columns = [attribute_column(name) for name in names]
    assert columns[:2] == ["sex", "attribute_visits"]
    assert len(set(columns) - {"visits"}) == len(names)


def test_a_table_that_shrank_is_refused(tmp_path):
    args = open_clip_arguments(train_data=str(write_pairs(tmp_path, 22, "train")))
    source = pair_source(args, options("--fair-attributes", "sex"))
    rows = torch.arange(21)
    with pytest.raises(UsageError, match="read 22 rows, but open_clip reads 21"):
        source.attach(DataLoader(TensorDataset(rows, rows), batch_size=4))


def test_a_run_resumed_on_fewer_rows_reports_the_lost_pairs_without_them(tmp_path):
    """Rows in descending order of their ids: the lost ones at either end, and in the middle."""
    data = write_data(tmp_path, 24)
    table = Path(data["train"])
    flags = ("--fair-loss", "--fair-attributes", "sex", "--fair-id-key", "pair")
    argv = (*flags, "--fair-save-pairs")
    assert train.main(arguments(data, tmp_path, "run", *argv, epochs=1)) == 0
    header, *lines = table.read_text().splitlines()
    every = {line.split("\t")[0]: line.split("\t") for line in lines}
    gone = {line.split("\t")[0] for line in lines[::23] + lines[8:14]}
    lines = [line for line in lines if line.split("\t")[0] not in gone]
    table.write_text("\n".join([header, *lines]) + "\n")
    assert train.main(arguments(data, tmp_path, "run", *argv, "--resume", "latest", epochs=2)) == 0
    rows = rows_of(tmp_path / "run" / "checkpoints" / "pairs_epoch_2.csv")
    assert {row["id"] for row in rows} == every.keys()
    for row in rows:
        _, file, caption, sex, *_ = every[row["id"]]
        there = ("", "", "", "1") if row["id"] in gone else (file, caption, sex, "2")
        assert (row["file"], row["caption"], row["sex"], row["visits"]) == there
    log = (tmp_path / "run" / "out.log").read_text().splitlines()
    for sex in "fm":
        flagged = [row["kind"] != "clean" for row in rows if row["sex"] == sex]
        assert f"sex={sex} {np.mean(flagged):.1%}" in [x for x in log if "pairs seen" in x][-1]


def synthetic(tmp_path, *more):
    data = {"model": write_model(tmp_path / "tiny"), "train": "unused"}
    argv = arguments(data, tmp_path, "run", "--dataset-type", "synthetic", *more, epochs=2)
    at = argv.index("--train-data")
    return argv[:at] + argv[at + 2 :]


def test_synthetic_pairs_are_named_by_row_and_take_labels_in_turn(tmp_path):
    flags = ("--fair-loss", "--fair-attributes", "kind=a,b,c", "--fair-save-pairs")
    with registered(Visits()) as record:
        assert train.main(synthetic(tmp_path, "--train-num-samples", "20", *flags)) == 0
    assert sum(map(len, record.epochs)) == 2 * (20 // BATCH) * BATCH
    rows = rows_of(tmp_path / "run" / "checkpoints" / "pairs_epoch_2.csv")
    assert_remembered(rows, record.visits)
    assert all(row["attribute_kind"] == "abc"[int(row["id"]) % 3] for row in rows)


SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
SMALL = ("--batch-size", "11")  # of the 20 pairs
OFFICIAL_ALONE = "comparisons in one process, got a base loss with world_size=2"


@pytest.mark.parametrize(
    ("launched", "flags", "message"),
    [
        ({}, ("--fair-attributes", "race"), "synthetic pairs have no attributes"),
        ({}, ("--fair-id-key", "id"), "synthetic pairs have no keys"),
        ({}, ("--batch-size", "21"), "20 pairs, fewer than one step takes"),
        ({}, ("--train-num-samples", "0"), "needs --train-num-samples"),
        ({"WORLD_SIZE": "2"}, SMALL, "holds 20 pairs, fewer than one step takes (--batch-size"),
        (SLURM, SMALL, "--accum-freq 1 x 2 processes)"),
        ({**SLURM, "PMI_SIZE": "2", "PMI_RANK": "1"}, SMALL, "x 2 processes)"),
        (SLURM, ("--fair-score", "official"), OFFICIAL_ALONE),
        ({"WORLD_SIZE": "2"}, ("--fair-preset", "official"), OFFICIAL_ALONE),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, SMALL, "2 processes were launched by MPI, of which"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (), "2 processes were launched by MPI, of which open_clip"),
    ],
)
def test_what_synthetic_pairs_lack_and_the_processes_of_every_launcher_are_known_at_first(
    tmp_path, capsys, monkeypatch, launched, flags, message
):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    fair = ("--fair-loss", "--fair-attributes", "kind=a,b", *flags)
    assert train.main(synthetic(tmp_path, "--train-num-samples", "20", *fair)) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


# ------------------------------ samples


def test_the_hash_is_fixed_for_good():
    """A saved memory names its pairs by it: these numbers may never change."""
    assert hashed_id("00000.tar", "000000001") == 6785523985337647980
    assert hashed_id("uid") == 415365056572302820
    assert hashed_id("", "\udcff") == hashed("", "\\udcff")


@given(*[st.text("a/\0\u00e9\udcff", max_size=5)] * 2)
def test_the_hash_is_of_shard_and_key(shard, key):
    plain = [text.encode("utf-8", "backslashreplace").decode() for text in (shard, key)]
    assert hashed_id(shard, key) == hashed(*plain)
    assert -(2**63) <= hashed_id(shard, key) < 2**63


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7), (-(2**63), -(2**63)), ("7", 7), (" -7 ", -7), ("0", 0), (str(-(2**63)), -(2**63)),
        ("007", hashed("007")), ("+7", hashed("+7")), ("-0", hashed("-0")), ("7.0", hashed("7.0")),
        ("\u0667", hashed("\u0667")),
        (2**63, None), (True, None), (1.0, None), (None, None), ("", None), ([1], None),
        ("NA", None), ("<NA>", None), ("null", None), (" ", None), ("-1", -1),
        ("9" * 32, hashed("9" * 32)), ("9" * 5000, hashed("9" * 5000)),
        (str(2**63), hashed(str(2**63))), ("a7f3", hashed("a7f3")),
    ],
)  # fmt: skip
def test_ids_in_the_json_member(value, expected):
    assert own_id(value) == expected


def test_names_of_shards_are_the_shortest_that_tell_them_apart_wherever_they_lie():
    shards = ["cc/0.tar", "cc/1.tar", "laion/0.tar"]
    for root in ("/mnt/a", "s3://bucket/deep/er", "/scratch"):
        assert list(shard_names(f"{root}/{shard}" for shard in shards).values()) == shards
    assert shard_names(["/data/a/0.tar", "/data/a/1.tar", "/data/a/0.tar"]) == {
        "/data/a/0.tar": "0.tar",
        "/data/a/1.tar": "1.tar",
    }
    assert shard_names(["/data/a/0.tar", "https://server/b/0.tar?signature=1"]) == {
        "/data/a/0.tar": "a/0.tar",
        "https://server/b/0.tar?signature=1": "b/0.tar",
    }
    same = ["s3://a/0.tar?v=1", "s3://a/0.tar?v=2"]
    assert shard_names(same) == {url: url for url in same}


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("Asian", 0), (" Black ", 1), (2, 2), ("2", 2), (2.0, 2), ("02", None), (True, 3),
        ("true", 3),
        ("#N/A", -1), ("<NA>", -1), ("-nan", -1), ("1.#QNAN", -1), ("null", -1), ("None", -1),
        (None, -1), ("", -1), ("unknown", -1), (-1, -1), (float("nan"), -1),
        ("Other", None), ([1], None), ({"a": 1}, None), (0.5, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("others_unknown", [False, True])
def test_codes_of_json_values(value, code, others_unknown):
    """A table's cell is coded alike, and refused alike."""
    labels = ("Asian", "Black", "2", "True")
    others = ",*" * others_unknown
    flags = options("--fair-attributes", f"race={','.join(labels)}{others}", "--fair-id-key", "id")
    stage, book = PairStage({"u": (5, "0.tar")}, flags), CodeBook({"race": labels})
    member = {"race": value, "id": 9}
    sample = {"__key__": "k", "__url__": "u", "json": member, "txt": "caption"}
    table = Table("t", {"race": ["Asian", "" if value is None else str(value).strip()]})
    allowed = ["race"] if others_unknown else []
    if code is None and not others_unknown:
        message = f"{IN_THE_JSON}expected one of 'Asian', 'Black', '2', 'True', got {value!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            list(stage([sample]))
        with pytest.raises(
            ValueError, match=r"'race': expected one of .* in 1 row, first in row 2"
        ):
            encode_attributes(table, ["race"], book, others_unknown=allowed)
        return
    code = -1 if code is None else code
    (passed,) = stage([sample])
    assert passed[FIELDS[0]].tolist() == [9, 5, 0, code]
    assert passed[FIELDS[1]] == "k" and passed["txt"] == "caption"
    codes, _ = encode_attributes(table, ["race"], book, others_unknown=allowed)
    assert codes[:, 0].tolist() == [0, code]


IN_THE_JSON = "shard 0.tar, sample k: key 'race' of the json member: "


@pytest.mark.parametrize(
    ("value", "code"),
    [(0, 0), ("2", 2), (1.0, 1), ("02", None), (-1, -1), (None, -1), ("", -1), (3, None),
     (-2, None), ("Asian", None), (0.5, None), (True, None)],
)  # fmt: skip
def test_without_labels_integers_are_codes_as_they_are(value, code):
    stage = PairStage({"u": (5, "0.tar")}, options("--fair-attributes", "race"))
    stage.coders["race"] = GroupCoder(codes_of(3))
    sample = {"__key__": "k", "__url__": "u", "json": {"race": value}}
    if code is None:
        message = "or labels given as --fair-attributes race=LABEL,LABEL,..., got "
        message = re.escape(f"{IN_THE_JSON}expected a code from 0 to 2, {message}{value!r}")
        with pytest.raises(ValueError, match=f"^{message}$"):
            list(stage([sample]))
        return
    (passed,) = stage([sample])
    assert passed[FIELDS[0]].tolist() == [hashed("0.tar", "k"), 5, 0, code]


def test_a_json_member_or_key_that_is_missing_is_unknown_and_told_apart():
    flags = options("--fair-attributes", "race=a", "sex=b", "--fair-id-key", "id")
    stage = PairStage({"u": (5, "0.tar")}, flags)
    samples = [{"__key__": "k", "__url__": "u"}, {"__key__": "k", "__url__": "u"}]
    samples[1]["json"] = {"sex": "b"}
    rows = torch.stack([passed[FIELDS[0]] for passed in stage(samples)])
    assert rows[:, GROUPS:].tolist() == [[-1, -1], [-1, 0]]
    assert rows[:, LACKS].tolist() == [0b1, 0b110]


def test_a_loader_of_another_build_is_refused():
    stage = PairStage({}, options("dbpm"))
    for loader in (DataLoader([1]), SimpleNamespace(pipeline=[SimpleNamespace(dataset=None)])):
        with pytest.raises(UsageError, match="has no stage to_tuple"):
            insert_stage(loader, stage)


# ------------------------------ shards at rest


@pytest.mark.parametrize("damage", [lambda content: b"no tar", *DAMAGES.values()])
def test_the_first_look_tells_codes_from_broken_shards_and_meta_members(tmp_path, damage):
    shards = write_shards(tmp_path, (3,) * 6, member=lambda n: {"race": n % 3} if n != 4 else None)
    broken = tmp_path / "00000.tar"  # open_clip passes over it, and so do we
    broken.write_bytes(damage(broken.read_bytes()))
    with tarfile.open(tmp_path / "00002.tar", "a") as tar:
        for extension in ("txt", "png", "json"):
            info = tarfile.TarInfo(f"__meta__/0.{extension}")
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    args = open_clip_arguments(train_data=shards, train_num_samples=18, accum_freq=10)
    state = torch.get_rng_state()
    source = pair_source(args, options("--fair-attributes", "race"))
    assert torch.equal(state, torch.get_rng_state())
    assert source.codebook.labels == {"race": ("0", "1", "2")}
    with pytest.raises(UsageError, match="an epoch has 9 batches, fewer than one step takes"):
        source.attach(SimpleNamespace(num_batches=9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_num_samples": None}, "there is no sizes.json .* give --train-num-samples"),
        ({"train_num_samples": None, "sizes": {}}, "cannot read the sizes .* give --train-num-sam"),
        ({"train_num_samples": 0}, "must be 1 or more, got 0"),
        ({"train_data": "{tmp}/{{0..}}.tar"}, "no shard file"),
        ({"train_data": "{tmp}/{{00000..00003}}.tar"}, "00002.tar'; 2 of 4 are missing"),
        ({"workers": 3}, "--workers 3 x 1 process need as many shards, got 2"),
    ],
)
def test_what_open_clip_would_refuse_late(tmp_path, changes, message):
    write_shards(tmp_path, (3, 3))
    values = {"train_data": "{tmp}/{{00000..00001}}.tar", "train_num_samples": 6, **changes}
    values["train_data"] = values["train_data"].format(tmp=tmp_path)
    if "sizes" in changes:
        (tmp_path / "sizes.json").write_text(json.dumps(values.pop("sizes")))
    with pytest.raises(UsageError, match=message):
        pair_source(open_clip_arguments(**values), options("dbpm"))


def test_every_worker_needs_a_shard_unless_they_are_resampled(tmp_path, monkeypatch):
    values = {"train_data": write_shards(tmp_path, (3, 3))}
    (tmp_path / "sizes.json").write_text(json.dumps({"00000.tar": 3, "00001.tar": 3}))
    assert pair_source(open_clip_arguments(**values, workers=2), options("dbpm"))
    resampled = open_clip_arguments(**values, workers=3, dataset_resampled=True)
    assert pair_source(resampled, options("dbpm"))
    monkeypatch.setenv("SLURM_NTASKS", "3")  # a process without workers reads for itself
    with pytest.raises(UsageError, match="--workers 0 x 3 processes need as many shards, got 2"):
        pair_source(open_clip_arguments(**values), options("dbpm"))


# ------------------------------ what is remembered of an epoch


def test_places_equal_a_dictionary():
    rng = np.random.default_rng(0)
    seen = SeenPairs(attributes=2)
    assert not len(seen.codes()[0]) and seen.places(None) == {}
    expected = {}
    for _ in range(7):
        batch = rng.integers(0, 40, 6)
        rows = np.stack([batch * 3, batch % 5, batch * 0, batch % 3 - 1, batch % 3], axis=1)
        keys = [f"key {pair} ü" for pair in batch]
        seen.add(torch.from_numpy(rows), keys)
        rows[:] = 99  # the loader's memory is its own
        for pair, key in zip(batch.tolist(), keys, strict=True):
            expected[pair * 3] = (pair % 5, key, (pair % 3 - 1, pair % 3))
    assert seen.places(None) == expected
    wanted = sorted(expected)[::3]
    assert seen.places([*wanted, 1, 1000]) == {pair: expected[pair] for pair in wanted}
    ids, codes = seen.codes()
    assert ids.tolist() == sorted(expected)
    assert codes.tolist() == [list(expected[pair][2]) for pair in ids.tolist()]


def test_flag_rates_equal_a_double_loop():
    rng = np.random.default_rng(1)
    flagged, codes = rng.random(50) < 0.3, rng.integers(-1, 3, (50, 2))
    codes[:, 1] = np.minimum(codes[:, 1], 1)  # the last group of the second is never seen
    book, expected = CodeBook({"a": ("x", "y", "z"), "b": ("u", "v", "w")}), {}
    for column, (name, labels) in enumerate(book.labels.items()):
        expected[name] = {}
        for code, label in enumerate(labels):
            if of_group := [bool(flagged[k]) for k in range(50) if codes[k, column] == code]:
                expected[name][label] = sum(of_group) / len(of_group)
    assert set(expected["b"]) == {"u", "v"}
    assert flag_rates(count_flagged(flagged, codes, book), book) == expected


def test_webdataset_is_imported_where_shards_are_read_alone():
    assert not {"webdataset", "wds", "open_clip_train", "open_clip_data"} & vars(module).keys()
