"""Tables, group codes, ids and labels; open_clip is the oracle for what a row is."""

from __future__ import annotations

import gzip
import json
import os
import re
import stat
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas._libs.parsers import STR_NA_VALUES

from fairclip_losses.data import (
    UNKNOWN,
    CodeBook,
    Table,
    encode_attributes,
    encode_labels,
    pair_ids,
    read_table,
    write_table,
    write_text,
)
from fairclip_losses.data.groups import given_attributes, group_remarks
from fairclip_losses.data.images import check_images
from fairclip_losses.errors import UsageError


def table_of(**columns):
    return Table("table.csv", {name: list(cells) for name, cells in columns.items()})


def written(tmp_path, text, encoding="utf-8", name="table.csv"):
    path = tmp_path / name
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "wb") as file:
        file.write(text.encode(encoding))
    return path


# Reading: open_clip's own data set is the oracle


def as_open_clip_reads(path, separator, image="f", caption="t"):
    data = pytest.importorskip("open_clip_train.data")
    dataset = data.CsvDataset(path, None, image, caption, separator)
    return [str(value) for value in dataset.images], [str(value) for value in dataset.captions]


LONG = "x" * 200_000


@pytest.mark.filterwarnings("ignore:Falling back to the 'python' engine")
@pytest.mark.parametrize(
    ("text", "separator", "group"),
    [
        ("f,t,g\n\n000000,one,007\n\n000001,two,7\n \n", ",", ["007", "7"]),
        ("f,t,g\r\na, b ,1.0\r\nc,,\r\n", ",", ["1.0", ""]),
        ("\ufefff,t,g\na,NA, x \nb,null,<NA>\n", ",", ["x", ""]),
        ("f,t,t,g,,\na,1,2,m,,\nb,,3,f,,\n", ",", ["m", "f"]),
        ("f;t; g \na;1,5;True\n7;2;False\n", ";", ["True", "False"]),
        ('f|t|g\na|"b|""c""\nd"|#N/A\ne|5"p|#NA\n', "|", ["", ""]),
        (f"f,t,g\na,{LONG},1\n1,b,{LONG}\n", ",", ["1", LONG]),
        ("f\tt\tg\na b\tc\t-nan\n", "\\t", [""]),
        ('f\tt\tg\na\t"b"\t"x"\nc\td\t""\n', "\\t", ["x", ""]),  # which keeps quotes
        ("f  t g\n1 2  1.#QNAN\n", r"\s+", [""]),
        ("f::t::g\n1::2::x\n", "::", ["x"]),
        (",f,t,g\n0,a,b,x\n1,,d,y\n", ",", ["x", "y"]),  # pandas' own index
        ("f t g\nr1 a b x\nr2 c d y\n", " ", ["x", "y"]),  # R's row names
        ("f,t,g\na\nb,c,d\n", ",", ["", "d"]),
    ],
)
@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_what_open_clip_holds_is_what_we_read(tmp_path, monkeypatch, text, separator, group, name):
    path = str(written(tmp_path, text, name=name))
    expected = as_open_clip_reads(path, separator)
    monkeypatch.setenv("HOME", str(tmp_path))
    for there in (path, f"~/{name}", f"file://{path}"):
        table = read_table(there, separator, as_open_clip=["f", "t"])
        assert (table.column("f"), table.column("t"), table.column("g")) == (*expected, group)
        assert len(table) == len(group)


def test_every_mark_of_pandas_is_unknown_and_none_is_a_label(tmp_path):
    cells = ["7.0", *STR_NA_VALUES, "-1", "Unknown", " NA ", "8"]
    path = written(tmp_path, "f,g\n" + "".join(f"a,{cell}\n" for cell in cells))
    read = read_table(path, ",", as_open_clip=["f"])
    for table in (read, table_of(g=[cell.strip() for cell in cells])):
        codes, book = encode_attributes(table, ["g"])
        assert book.labels == {"g": ("7", "8")}
        assert codes[:, 0].tolist() == [0, *[UNKNOWN] * (len(cells) - 2), 1]
    for mark in STR_NA_VALUES:
        with pytest.raises(ValueError, match="which stands for an unknown value"):
            given_attributes([f"g=a,{mark}"], "--fair-attributes")


@settings(max_examples=20)
@given(st.lists(st.sampled_from(["1", "2", "10"]), min_size=1, max_size=6))
def test_labels_are_the_same_with_and_without_gaps(tmp_path_factory, cells):
    """A data frame writes its integers as floats once a value is missing."""
    path = tmp_path_factory.mktemp("gaps") / "table.csv"
    frame = pd.DataFrame({"g": [*map(int, cells), None]})
    for whole in (frame, frame.astype("Int64"), frame.astype(object)):
        whole.assign(f="a").to_csv(path, index=False)
        codes, book = encode_attributes(read_table(path, ","), ["g"])
        expected, same = encode_attributes(table_of(g=cells), ["g"])
        assert book == same and codes[:, 0].tolist() == [*expected[:, 0].tolist(), UNKNOWN]


CELL = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\uffff\ufeff", exclude_categories=["Cs"]),
    max_size=8,
)


@settings(max_examples=40)
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6), st.sampled_from(",\t;"))
def test_written_table_reads_back(tmp_path_factory, rows, separator):
    path = tmp_path_factory.mktemp("round") / "table.csv"
    write_table(path, ["first", "second"], rows, separator)
    stripped = [
        tuple("" if cell in STR_NA_VALUES else cell.strip() for cell in row) for row in rows
    ]
    columns = read_table(path, separator).columns
    assert list(zip(columns["first"], columns["second"], strict=True)) == stripped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got an empty file"),
        ("\n \n", "got an empty file"),
        ("a,b\n", "got the header alone"),
        ("a,b\n1,2\n\n1,2,3\n", r"line 4: expected 2 cells separated by ',' .* got 3"),
        ('a,b\n1,"2\n3,4\n5,6\n', r"the quote \(\"\) opened in row 1 is never closed"),
        ("a,b\n1,2,\n3,4,\n", "more cells than the header, the last .* take the ',' off the rows"),
        (b"\xe4,b\n1,2\n", "cannot read the table: .*utf-8.*; save it as UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "cannot read the table: .*; save it as UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"table\.csv: .*" + message):
        read_table(path, ",")


def test_unreadable_files(tmp_path, monkeypatch):
    (tmp_path / "broken.csv.gz").write_bytes(b"no archive")
    for name, message in (
        ("missing.csv", r"missing\.csv: cannot read the table: No such file"),
        ("", "cannot read the table: Is a directory"),
        ("broken.csv.gz", r"broken\.csv\.gz: cannot read the table: Not a gzipped"),
    ):
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / name)
    with pytest.raises(ValueError, match="expected a separator of one character or more, got ''"):
        read_table(tmp_path / "table.csv", "")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match=r"takes pandas .*fairclip_losses\[evaluate\]"):
        read_table(tmp_path / "table.csv")


@pytest.mark.parametrize(
    ("header", "separator", "meant"),
    [
        ("f;t", ",", ";"),
        ("f,t", "\t", ","),
        ("f\tt", ",", "$'\\t'"),
        ("f t", ",", "' '"),
        ("f|t", ",", "|"),
        ("a:b/c;f", ",", ";"),
        ("t, long;f", ",", ";"),
        ('"f";"my, t"', ";x", ";"),
        ('"f";"t"', ",", ";"),
        ("image;caption", ",", ";"),  # of other names
        ('"f"\t"t"', "\\t", "$'\\t'"),  # pandas leaves quotes where the separator is a pattern
        ("image (png)", ",", None),
    ],
)
def test_a_wrong_separator_is_guessed_from_the_header(tmp_path, header, separator, meant):
    table = read_table(written(tmp_path, header + "\n" + header), separator)
    with pytest.raises(ValueError, match="no column 'f'; the columns are ") as caught:
        table.column("f")
    hint = str(caught.value).partition("; is it --csv-separator ")[2]
    assert hint.startswith(f"{meant} ?") if meant else not hint


def test_an_image_that_is_not_there_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    (tmp_path / "0").touch()
    for text, message in (
        ("f,t\na.png,x\n\n /b.png,y\n", r"row 2: no image file ' /b.png' \(paths are relative to"),
        ("f,t\na.png,x\n/b.png,y\n", r"row 2: no image file '/b.png'$"),
        ("f,t\n a.png,x\n", r"row 1: white space around the image file ' a.png'"),
        ("f,t\na.png,x\nNA,y\n", r"row 2: no image file 'nan' \(the cell is empty or a missing"),
        ("f,t\nx,y,z\n", r"row 1: no image file 'y' \(.*; the rows have more cells than the head"),
        ("f,t\n000000,x\n000001,x\n", r"row 2: no image file '1' \(.*: 000000 as 0\)"),
    ):
        table = read_table(written(tmp_path, text), ",", as_open_clip=["f", "t"])
        with pytest.raises(ValueError, match=message):
            check_images(table, "f")


# Groups that cannot be compared


OF_50 = [str(k % 50) for k in range(999)]


@pytest.mark.parametrize(
    ("cells", "given", "message"),
    [
        (["-1", "1"] * 30, None, r"one known .*, '1' \(30 of 60 rows, 30 unknown\).*: g=-1,1$"),
        (["-1", "1"] * 30, ("-1", "1"), None),
        (["a"] * 20, None, r"one known group alone, 'a' \(20 of 20 rows, 0 unknown\): .* groups$"),
        (["a", "b"] * 10, ("a", "x", "b"), r"3 groups in 20 rows, .* \('x' 0, 'a' 10, 'b' 10\)"),
        (["a", "b"] * 10, None, None),
        (["a"] * 99 + ["b"], None, r"2 groups in 100 rows, some too small .* \('b' 1, 'a' 99\)"),
        (OF_50[:120], None, r"50 groups in 120 rows, some .*\('20' 2, .*, \.\.\.\)"),
        (OF_50, None, "50 groups in 999 rows, more than a batch can hold"),
    ],
)
def test_groups_alone_many_or_tiny_are_said_in_one_line(cells, given, message):
    table = table_of(g=cells)
    codes, book = encode_attributes(table, ["g"], given=given and {"g": given})
    said = group_remarks(table, codes, book)
    assert len(said) == (message is not None)
    assert not said or (re.search(message, said[0]) and "\n" not in said[0])


# Writing


def test_write_table_formats_cells_and_refuses_ragged_rows(tmp_path):
    path = tmp_path / "new" / "out.csv"
    write_table(path, ["id", "x"], [(1, None), (np.int64(2), 0.5), (3, "a,b")])
    assert path.read_text() == 'id,x\n1,\n2,0.5\n3,"a,b"\n'
    with pytest.raises(ValueError, match="row 2: expected 1 cells, got 2"):
        write_table(path.with_name("no.csv"), ["id"], [(1,), (2, 3)])
    assert os.listdir(path.parent) == ["out.csv"]


def test_write_text_replaces_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    path, plain = tmp_path / "out.txt", tmp_path / "plain.txt"
    plain.write_text("")
    for text in ("old", "new"):
        write_text(path, text)
        assert path.read_text() == text
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    monkeypatch.delattr(os, "replace")
    with pytest.raises(AttributeError):
        write_text(path, "newer")
    assert path.read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["out.txt", "plain.txt"]


# Attributes

HUGE = "1" + "0" * 5000
MISSING = ["", "NA", "n/a", "NaN", "None", "null", "UNKNOWN", "-1", "-1.0"]


@pytest.mark.parametrize(
    ("cells", "codes", "labels"),
    [
        # A data frame turns integers into floats where a cell is missing.
        (["1.0", "", "1", "+2", "2."], [0, -1, 0, 1, 1], ("1", "2")),
        (["007", "7", "07"], [0, 2, 1], ("007", "07", "7")),
        (["007", "008"], [0, 1], ("007", "008")),
        (["TRUE", "true", "False", "True"], [1, 1, 0, 1], ("False", "True")),
        (["1.5", "a", "01", "1"], [2, 3, 0, 1], ("01", "1", "1.5", "a")),
        (
            ["-2", HUGE, "7", "-" + HUGE, "+7.0", "-0", "0", "+" + HUGE, ""],
            [1, 4, 3, 0, 3, 2, 2, 4, UNKNOWN],
            ("-" + HUGE, "-2", "0", "7", HUGE),
        ),
        (list(map(str, range(64))), list(range(64)), tuple(map(str, range(64)))),
        (["b", *MISSING, "a"], [1, *[UNKNOWN] * 9, 0], ("a", "b")),
        (["0", *MISSING, "1"], [0, *[UNKNOWN] * 9, 1], ("0", "1")),
    ],
)
def test_whole_numbers_are_one_label_however_written_and_names_among_names(cells, codes, labels):
    encoded, book = encode_attributes(table_of(g=cells), ["g"])
    assert encoded[:, 0].tolist() == codes
    assert book.labels == {"g": labels}


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["a", "b", "B", "", "na", "10", "9"])))
def test_codes_and_labels_are_inverse(cells):
    cells = ["a", *cells]
    codes, book = encode_attributes(table_of(g=cells), ["g"])
    labels = book.labels["g"]
    decoded = [labels[code] if code >= 0 else None for code in codes[:, 0]]
    assert decoded == [None if cell in ("", "na") else cell for cell in cells]
    assert set(codes[:, 0].tolist()) - {UNKNOWN} == set(range(len(labels)))
    again, same = encode_attributes(table_of(g=cells), ["g"], book)
    np.testing.assert_array_equal(codes, again)
    assert same == book


def test_columns_by_name_and_a_given_code_book_decides_and_keeps_absent_groups():
    table = table_of(sex="mfm", site=["10", "9", "2"])
    codes, book = encode_attributes(table, ["site", "sex"])
    np.testing.assert_array_equal(codes, [[2, 1], [1, 0], [0, 1]])
    assert codes.dtype == np.int64
    assert book.labels == {"site": ("2", "9", "10"), "sex": ("f", "m")}
    assert book.num_groups == {"site": 3, "sex": 2}
    codes, used = encode_attributes(table_of(site=["10.0", "nan"], sex=["m", ""]), ["site"], book)
    assert codes[:, 0].tolist() == [2, UNKNOWN]
    assert used.labels == {"site": ("2", "9", "10")}


def test_a_value_outside_the_code_book_is_refused_or_unknown():
    book = CodeBook({"sex": ("f", "m"), "race": ("a", "b")})
    table = table_of(sex=["f", "x", "", "m"], race=["a", "b", "c", "a"], site=[*"xxy", "na"])
    codes, _ = encode_attributes(table, ["sex"], book, others_unknown=["sex"])
    assert codes[:, 0].tolist() == [0, UNKNOWN, UNKNOWN, 1]
    table.columns["sex"] = ["f", "x", "y", "y"]
    refused = r"column 'sex': expected one of 'f', 'm', got 'y' in 2 rows, first in row 3$"
    sites = CodeBook({"site": ("a", "b")})
    for names, keep, others, message in (
        (["sex"], book, (), refused),
        (["sex", "race"], book, ["sex"], "column 'race': expected one of 'a', 'b', got 'c' in 1"),
        (["site"], sites, ["site"], "column 'site': expected groups, got no known value in 4"),
        (["site"], book, (), r"the code book holds only \['race', 'sex'\]"),
        ([], book, (), "names, each once"),
        (["sex"] * 2, book, (), "each once"),
        (["h"], None, (), "no column"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_attributes(table, names, keep, others_unknown=others)


def test_a_code_book_gives_every_code_one_meaning_and_is_written_as_json(tmp_path):
    CodeBook({"sex": ("f", "m"), "größe": ("s", "l")}).to_json(tmp_path / "book.json")
    written = (tmp_path / "book.json").read_text()
    assert json.loads(written) == {"sex": ["f", "m"], "größe": ["s", "l"]}
    for labels, message in (((), "at least one label"), (("f", "f"), "each label once")):
        with pytest.raises(ValueError, match=f"attribute 'sex': .*{message}"):
            CodeBook({"sex": labels})


# Ids and labels


def test_ids_are_row_numbers_or_a_column():
    table = table_of(id=["7", "-3", str(2**63 - 1), str(-(2**63)), "0" * 5000 + "1"])
    assert pair_ids(table).tolist() == [0, 1, 2, 3, 4]
    ids = pair_ids(table, "id")
    assert ids.tolist() == [7, -3, 2**63 - 1, -(2**63), 1] and ids.dtype == np.int64
    with pytest.raises(ValueError, match="no column 'key'"):
        pair_ids(table, "key")


@pytest.mark.parametrize(
    ("cells", "codes", "labels"),
    [
        (["yes", "no", "yes"], [1, 0, 1], ["no", "yes"]),
        ("10", [1, 0], "01"),
        ("11", [1, 1], "01"),
        (["2", "1.0"], [2, 1], "0123"),
        ("02", [0, 2], "012"),
        ("21", [1, 0], "12"),
        (["10", "9", "8"], [2, 1, 0], ["8", "9", "10"]),
        (["1", "-1", "-1.0"], [1, 0, 0], ["-1", "1"]),
    ],
)
def test_labels(cells, codes, labels):
    encoded, names = encode_labels(table_of(y=cells), "y", len(labels))
    assert encoded.tolist() == codes and encoded.dtype == np.int64 and names == tuple(labels)


# What cannot be coded


as_groups = ("g", lambda table: encode_attributes(table, ["g"]))
as_ids = ("id", lambda table: pair_ids(table, "id"))
as_labels = ("y", lambda table: encode_labels(table, "y", 2))


@pytest.mark.parametrize(
    ("encoder", "cells", "message"),
    [
        (as_groups, ["1.5", "2"], "attribute column 'g': .* got the number 1.5; bin it first"),
        (as_groups, ["1e3", "2"], "got the number 1e3; bin it first"),
        (as_groups, ["inf", "2"], "got the number inf; bin it first"),
        (as_groups, ["", "na", "-1"], "got no known value in 3 rows"),
        (as_groups, ["+" + str(i) for i in range(65)], "at most 64 groups, got 65"),
        (as_groups, [f"id{i}" for i in range(65)], "at most 64 .* 65 distinct values: an id"),
        (as_ids, ["1", "a7", "b"], "id column 'id': expected integers, got 'a7' in row 2"),
        (as_ids, ["1", "2.0"], "expected integers, got '2.0' in row 2"),
        (as_ids, ["1", ""], "expected integers, got '' in row 2"),
        (as_ids, ["1", "٣"], "expected integers, got '٣' in row 2"),
        (as_ids, [str(2**63)], "64-bit integers, got 9223372036854775808 in row 1"),
        (as_ids, ["7", "9" * 5000], "64-bit integers, got 9{5000} in row 2"),
        (as_ids, ["5", "6", "5", "06"], r"each id once, got 2 of them more than once \(5, 6"),
        (as_labels, ["a", "b", "c"], "expected 2 classes, got 3 distinct values: 'a', 'b', 'c'"),
        (as_labels, ["a", "a"], "expected 2 classes, got 1 distinct values"),
        (as_labels, ["1", "2", "3"], "expected 2 classes, got 3"),
        (as_labels, ["a", ""], "label column 'y': expected a label in every row, got '' in row 2"),
        (as_labels, ["1", "-1", "0"], "expected 2 classes, got 3 distinct values: '-1', '0', '1'"),
        (as_labels, ["0.5", "1"], "got the number 0.5"),
    ],
)
def test_what_cannot_be_coded_is_named(encoder, cells, message):
    column, encode = encoder
    with pytest.raises(ValueError, match=r"table\.csv: .*" + message):
        encode(table_of(**{column: cells}))
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        encode_labels(table_of(y=cells), "y", 1)
