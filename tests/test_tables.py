"""Tables, group codes, ids and labels; pandas is the oracle for what a row is."""

from __future__ import annotations

import io
import json
import os
import stat

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def table_of(**columns):
    return Table("table.csv", {name: list(cells) for name, cells in columns.items()})


def written(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode(encoding))
    return path


# Reading


def test_reads_cells_as_stripped_strings_and_says_where_white_space_was(tmp_path):
    table = read_table(written(tmp_path, "file\tsex \n a.png \tf\n b.png\t 1\n"))
    assert table.columns == {"file": ["a.png", "b.png"], "sex": ["f", "1"]}
    assert len(table) == 2
    assert table.column("sex") == ["f", "1"]
    with pytest.raises(ValueError, match=r"no column 'sx'; the columns are 'file', 'sex'"):
        table.column("sx")
    table = read_table(written(tmp_path, "a, b,c,d\n1,2,3,4\n5, 6,7,8 \n9,0 ,1, 2\n"), ",")
    assert list(table.columns) == ["a", "b", "c", "d"]
    assert table.padded == {"b": 0, "d": 2}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_any_line_end_with_or_without_the_last(tmp_path, end, last):
    text = end.join(["a,b", "1,2", "3,4"]) + (end if last else "")
    assert read_table(written(tmp_path, text), ",").columns == {"a": ["1", "3"], "b": ["2", "4"]}


@pytest.mark.parametrize("separator", [*";| e,", "\\t"])  # a shell's backslash t is a tab
def test_separators_byte_order_mark_and_quotes(tmp_path, separator):
    mark = "\t" if separator == "\\t" else separator
    path = written(tmp_path, f"a{mark}b\n1{mark}2\n", "utf-8-sig")
    assert read_table(path, separator).columns == {"a": ["1"], "b": ["2"]}
    path = written(tmp_path, f'a{mark}b\n"x{mark} ""y""\nz"{mark}5"p\n')
    assert read_table(path, separator).columns == {"a": [f'x{mark} "y"\nz'], "b": ['5"p']}


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n\n1,2\n\n\n3,4\n\n",
        "\n\na,b\n1,2\n",
        "a,b\n   \n1,2\n",
        "a\n1\n\n  \n2\n",
        'a\n1\n""\n2\n',
        "a,b\n1,2\n,\n",
    ],
)
def test_blank_lines_are_rows_exactly_where_pandas_says(tmp_path, text):
    expected = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    table = read_table(written(tmp_path, text), ",")
    assert table.columns == expected.to_dict("list")


CELL = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\uffff\ufeff", exclude_categories=["Cs"]),
    max_size=8,
)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6), separator=st.sampled_from(",\t;")
)
def test_written_table_reads_back(tmp_path_factory, rows, separator):
    path = tmp_path_factory.mktemp("round") / "table.csv"
    write_table(path, ["first", "second"], rows, separator)
    stripped = [tuple(cell.strip() for cell in row) for row in rows]
    columns = read_table(path, separator).columns
    assert list(zip(columns["first"], columns["second"], strict=True)) == stripped
    by_pandas = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    assert len(by_pandas) == len(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got an empty file"),
        ("\n \n", "got an empty file"),
        ("a,b\n", "got the header alone"),
        ("a,b,a\n1,2,3\n", r"each column name once, got \['a'\]"),
        ("a,b\n1,2\n\n1,2,3\n", r"row 2 \(line 4\): expected 2 cells separated by ',' .* got 3"),
        ("a,b\n1\n", r"row 1 \(line 2\): expected 2 cells .* got 1"),
        ('a,b\n"1\n1",2\n"3\n3"\n', r"row 2 \(line 4\)"),
        ('a,b\n1,"2\n3,4\n5,6\n', "opened in the row that starts at line 2 is never closed"),
        ('a,"b', "opened in the row that starts at line 1 is never closed"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=r"table\.csv: .*" + message):
        read_table(written(tmp_path, text), ",")


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.csv: cannot read the table: No such file"):
        read_table(tmp_path / "missing.csv")
    with pytest.raises(ValueError, match="cannot read the table: Is a directory"):
        read_table(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read the table: .*utf-8"):
        read_table(written(tmp_path, "ä\n1\n", "latin-1"))
    with pytest.raises(ValueError, match="cannot read the table: field larger than"):
        read_table(written(tmp_path, "a\n" + "x" * 200_000 + "\n"))
    for separator in ("", ",,", '"', "\n", "\r"):
        with pytest.raises(ValueError, match="separator of one character"):
            read_table(written(tmp_path, "a,b\n1,2\n"), separator)


# Writing


def test_write_table_formats_cells_and_refuses_ragged_rows(tmp_path):
    path = tmp_path / "new" / "out.csv"
    write_table(path, ["id", "x"], [(1, None), (np.int64(2), 0.5), (3, "a,b")])
    assert path.read_text() == 'id,x\n1,\n2,0.5\n3,"a,b"\n'
    with pytest.raises(ValueError, match="row 2: expected 1 cells, got 2"):
        write_table(tmp_path / "no.csv", ["id"], [(1,), (2, 3)])
    assert not (tmp_path / "no.csv").exists()


def test_write_text_replaces_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "out.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    plain = tmp_path / "plain.txt"
    plain.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "newer")
    assert path.read_text() == "new"
    assert {entry.name for entry in tmp_path.iterdir()} == {"out.txt", "plain.txt"}


# Attributes

HUGE = "1" + "0" * 5000


def test_strings_are_coded_alphabetically_and_integers_numerically():
    table = table_of(sex=["m", "f", "m"], site=["10", "9", "2"])
    codes, book = encode_attributes(table, ["site", "sex"])
    np.testing.assert_array_equal(codes, [[2, 1], [1, 0], [0, 1]])
    assert codes.dtype == np.int64
    assert book.labels == {"site": ("2", "9", "10"), "sex": ("f", "m")}
    assert book.num_groups == {"site": 3, "sex": 2}


@pytest.mark.parametrize(
    "missing",
    ["", "NA", "n/a", "NaN", "None", "null", "UNKNOWN", "-1", "-1.0"],
)
@pytest.mark.parametrize("known", [["a", "b"], ["0", "1"]])
def test_missing_values_are_unknown(missing, known):
    codes, book = encode_attributes(table_of(g=[known[0], missing, known[1]]), ["g"])
    assert codes[:, 0].tolist() == [0, UNKNOWN, 1]
    assert book.labels == {"g": tuple(known)}


@pytest.mark.parametrize(
    ("cells", "codes", "labels"),
    [
        # A data frame turns integers into floats where a cell is missing.
        (["1.0", "", "1", "01", "+2", "2."], [0, -1, 0, 0, 1, 1], ("1", "2")),
        (["1.5", "a", "01", "1"], [2, 3, 0, 1], ("01", "1", "1.5", "a")),
        (
            ["-2", HUGE, "7", "-" + HUGE, "+007.0", "-0", "0", "00" + HUGE, ""],
            [1, 4, 3, 0, 3, 2, 2, 4, UNKNOWN],
            ("-" + HUGE, "-2", "0", "7", HUGE),
        ),
        (list(map(str, range(64))), list(range(64)), tuple(map(str, range(64)))),
    ],
)
def test_whole_numbers_are_one_label_however_written_and_names_among_names(cells, codes, labels):
    encoded, book = encode_attributes(table_of(g=cells), ["g"])
    assert encoded[:, 0].tolist() == codes
    assert book.labels == {"g": labels}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(["a", "b", "B", "", "na", "10", "9"]), min_size=1).filter(
        lambda cells: set(cells) - {"", "na"}
    )
)
def test_codes_and_labels_are_inverse(cells):
    codes, book = encode_attributes(table_of(g=cells), ["g"])
    labels = book.labels["g"]
    decoded = [labels[code] if code >= 0 else None for code in codes[:, 0]]
    assert decoded == [None if cell in ("", "na") else cell for cell in cells]
    assert set(codes[:, 0].tolist()) - {UNKNOWN} == set(range(len(labels)))
    again, same = encode_attributes(table_of(g=cells), ["g"], book)
    np.testing.assert_array_equal(codes, again)
    assert same == book


def test_a_given_code_book_decides_and_keeps_absent_groups():
    book = CodeBook({"sex": ("f", "m", "x"), "site": ("1", "2")})
    codes, used = encode_attributes(table_of(sex=["x", "f"]), ["sex"], book)
    assert codes[:, 0].tolist() == [2, 0]
    assert used.labels == {"sex": ("f", "m", "x")}
    codes, _ = encode_attributes(table_of(site=["2.0", "nan"]), ["site"], book)
    assert codes[:, 0].tolist() == [1, UNKNOWN]


def test_a_value_outside_the_code_book_is_refused_or_unknown():
    book = CodeBook({"sex": ("f", "m")})
    with pytest.raises(
        ValueError,
        match=r"column 'sex': expected one of 'f', 'm', got 'y' in 2 rows, first in row 3$",
    ):
        encode_attributes(table_of(sex=["f", "x", "y", "y"]), ["sex"], book)
    with pytest.raises(ValueError, match=r"the code book holds only \['sex'\]"):
        encode_attributes(table_of(race=["a"]), ["race"], book)
    book = CodeBook({"sex": ("f", "m"), "race": ("a", "b")})
    table = table_of(sex=["f", "x", "", "m"], race=["a", "b", "c", "a"])
    codes, _ = encode_attributes(table, ["sex"], book, others_unknown=["sex"])
    assert codes[:, 0].tolist() == [0, UNKNOWN, UNKNOWN, 1]
    with pytest.raises(ValueError, match=r"column 'race': expected one of 'a', 'b', got 'c' in 1"):
        encode_attributes(table, ["sex", "race"], book, others_unknown=["sex"])
    with pytest.raises(ValueError, match="column 'sex': expected groups, got no known value in 2"):
        encode_attributes(table_of(sex=["x", "na"]), ["sex"], book, others_unknown=["sex"])


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "attribute names, each once"), (["g", "g"], "each once"), (["h"], "no column 'h'")],
)
def test_attribute_names_must_be_given_once(names, message):
    with pytest.raises(ValueError, match=message):
        encode_attributes(table_of(g=["1"]), names)


# Code books


def test_a_code_book_gives_every_code_one_meaning_and_is_written_as_json(tmp_path):
    book = CodeBook({"sex": ("f", "m"), "größe": ("s", "l")})
    path = tmp_path / "run" / "book.json"
    book.to_json(path)
    assert json.loads(path.read_text()) == {"sex": ["f", "m"], "größe": ["s", "l"]}
    for labels, message in (((), "at least one label"), (("f", "f"), "each label once")):
        with pytest.raises(ValueError, match=f"attribute 'sex': .*{message}"):
            CodeBook({"sex": labels})


# Ids


def test_ids_are_row_numbers_or_a_column():
    table = table_of(id=["7", "-3", str(2**63 - 1), str(-(2**63))])
    assert pair_ids(table).tolist() == [0, 1, 2, 3]
    ids = pair_ids(table, "id")
    assert ids.tolist() == [7, -3, 2**63 - 1, -(2**63)]
    assert ids.dtype == np.int64
    with pytest.raises(ValueError, match="no column 'key'"):
        pair_ids(table, "key")


# Labels


@pytest.mark.parametrize(
    ("cells", "classes", "codes", "labels"),
    [
        (["yes", "no", "yes"], 2, [1, 0, 1], ("no", "yes")),
        (["1", "0"], 2, [1, 0], ("0", "1")),
        (["1", "1"], 2, [1, 1], ("0", "1")),
        (["2", "1.0"], 4, [2, 1], ("0", "1", "2", "3")),
        (["0", "2"], 3, [0, 2], ("0", "1", "2")),
        (["2", "1"], 2, [1, 0], ("1", "2")),
        (["10", "9", "8"], 3, [2, 1, 0], ("8", "9", "10")),
    ],
)
def test_labels(cells, classes, codes, labels):
    encoded, names = encode_labels(table_of(y=cells), "y", classes)
    assert encoded.tolist() == codes
    assert encoded.dtype == np.int64
    assert names == labels


# What cannot be coded


def as_groups(cells):
    encode_attributes(table_of(g=cells), ["g"])


def as_ids(cells):
    pair_ids(table_of(id=cells), "id")


def as_labels(cells, classes=2):
    encode_labels(table_of(y=cells), "y", classes)


@pytest.mark.parametrize(
    ("encode", "cells", "message"),
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
        (as_labels, ["1", "-1"], "expected a label in every row, got '-1' in row 2"),
        (as_labels, ["0.5", "1"], "got the number 0.5"),
    ],
)
def test_what_cannot_be_coded_is_named(encode, cells, message):
    with pytest.raises(ValueError, match=r"table\.csv: .*" + message):
        encode(cells)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        as_labels(cells, 1)
