"""Where training pairs come from, and the pairs in rows: CSV files and synthetic data sets."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.groups import CodeBook, encode_attributes, group_remarks
from ..data.images import check_images, is_deep
from ..data.tables import IntArray, Table, pair_ids, read_table
from ..errors import UsageError, one_line, usage_errors
from ..miners import MinerReport
from .flags import FairOptions
from .pair_reports import FlagRates, attribute_column, count_flagged, flag_rates

PREFIX = "fair_"  # of the keys that ids and groups have in a batch that is a dict


class PairBatch(NamedTuple):
    """What travels beside a batch of B pairs, on the CPU."""

    ids: Tensor  # (B,) int64
    groups: Tensor  # (B, C) int64 group codes, -1 unknown


def process_count() -> int:
    """Return how many processes will train, from whatever has launched them.

    By open_clip's own reading of the environment: what its arguments say of it comes later.
    """
    from open_clip_train.distributed import is_using_distributed, world_info_from_env

    count = int(world_info_from_env()[2])
    if count > 1 and not is_using_distributed():
        raise UsageError(
            f"{count} processes were launched by MPI, of which open_clip makes {count} runs of one "
            "process each: launch them by torchrun or srun (or set WORLD_SIZE=1 for such runs)"
        )
    return count


class PairSource(ABC):
    """A source of training pairs that knows each pair's id and groups.

    The data are checked when it is made, before open_clip builds its model. Its methods are called
    in the order in which they stand here.
    """

    codebook: CodeBook  # what the group codes mean, the same in every process
    codes: Tensor  # (n, C) int64 group codes of all pairs, or of those first looked at
    identity: str  # what the ids depend on: two runs with the same text name pairs alike
    num_pairs: int | None = None  # where ids are 0..num_pairs-1; None for any int64 ids
    remarks: Sequence[str] = ()  # what to warn of before training
    deep: str | None = None  # the first image of more than 8 bits that was taken, in words

    @abstractmethod
    def attach(self, loader: Any) -> None:
        """Make open_clip's training loader carry ids and groups beside its pairs."""

    @abstractmethod
    def take(self, batch: Sequence[Any]) -> tuple[tuple[Any, ...], PairBatch]:
        """Return the batch as open_clip expects it, and what its last item, our own, says."""

    @abstractmethod
    def end_epoch(self, epoch: int, report: MinerReport | None) -> FlagRates:
        """End an epoch (from 0), in every process; return the flag rates where there is a report.

        The miner's report is None but in the first process.
        """

    @abstractmethod
    def describe(self, ids: IntArray) -> dict[str, Sequence[object]]:
        """Return by column name what is known of each pair; in the first process."""


def is_read_as(kind: str, path: str | None, args: Any) -> bool:
    """Whether open_clip will read a data path as ``csv`` (or TSV), or as ``webdataset``."""
    endings = {"csv": ("csv", "tsv"), "webdataset": ("tar",)}[kind]
    by_name = args.dataset_type == "auto" and str(path).split(".")[-1] in endings
    return bool(path) and (args.dataset_type == kind or by_name)


def read_pairs(path: str, args: Any) -> Table:
    """Read a table of pairs; a UsageError says what of it open_clip could not read either."""
    names = (args.csv_img_key, args.csv_caption_key)
    with usage_errors():
        table = read_table(path, args.csv_separator, as_open_clip=names)
        for name in names:
            try:
                table.column(name)
            except ValueError as error:
                raise ValueError(f"{error} (see --csv-img-key, --csv-caption-key)") from None
            if name not in table.columns:
                raise ValueError(
                    f"{path}: the name of column {name!r} has white space around it, which is a "
                    "part of it for open_clip; take it off"
                )
        check_images(table, args.csv_img_key)
    return table


def empty_captions(table: Table, column: str) -> tuple[str, ...]:
    """Say how many captions are empty, and what open_clip trains in their place."""
    cells = table.column(column)
    rows = [row for row, cell in enumerate(cells, start=1) if cell == "nan" or not cell.strip()]
    if not rows:
        return ()
    return (
        f"{table.path}: {len(rows)} of {len(cells)} captions are empty or missing marks such as NA "
        f"(column {column!r}, first in row {rows[0]}): open_clip trains them as the text 'nan', or "
        "blank; write captions or leave the rows out",
    )


def read_groups(table: Table, options: FairOptions) -> tuple[IntArray, CodeBook]:
    """Return the codes (N, C) of ``--fair-attributes``, by the labels given or those there are."""
    names = options.fair_attributes
    if not names:  # bad pair mining alone goes without
        return np.empty((len(table), 0), dtype=np.int64), CodeBook({})
    with usage_errors():
        labels, others = options.fair_labels, options.fair_others_unknown
        return encode_attributes(table, names, given=dict(labels), others_unknown=others)


class NamedDataset(Dataset[Any]):
    """A dataset of rows that names the row, and the file, of what cannot be read."""

    def __init__(self, inner: Any, where: str) -> None:
        self.inner = inner
        self.where = where

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.inner[index]
        except Exception as error:  # Pillow raises more than OSError for broken files
            text, row = one_line(error), f"{self.where}: row {index + 1}"
            if (files := getattr(self.inner, "images", None)) is not None:
                text = text.removeprefix(f"{files[index]}: ")
                row = f"{row}: cannot read image {str(files[index])!r}"
            raise ValueError(f"{row}: {text}") from error


def name_rows(data: Mapping[str, Any], args: Any, *names: str) -> None:
    """Have the data sets of these names that are tables name the row that cannot be read."""
    for name in names:
        path = getattr(args, f"{name}_data")
        if name in data and is_read_as("csv", path, args):
            loader = data[name].dataloader
            if not isinstance(loader.dataset, NamedDataset):
                vars(loader)["dataset"] = NamedDataset(loader.dataset, path)


class IndexedDataset(NamedDataset):
    """A dataset of pairs, tuples or dicts, that gives each sample's row number beside it.

    The number of a row whose image is deep is given as its complement, which is negative: so the
    first process hears of it, whichever process has read the image.
    """

    def __init__(self, inner: Any, where: str) -> None:
        super().__init__(inner, where)
        self._is_deep = False  # the image read last
        self._transform = getattr(inner, "transforms", None)
        if self._transform is not None:
            inner.transforms = self._look_at

    def _look_at(self, image: Any) -> Any:
        """Look at an image between open_clip's opening and its transform: its mode is there."""
        self._is_deep = is_deep(image)
        return cast(Any, self._transform)(image)

    def __getitem__(self, index: int) -> Any:
        self._is_deep = False
        sample = super().__getitem__(index)
        row = ~index if self._is_deep else index
        if isinstance(sample, Mapping):
            return {**sample, f"{PREFIX}row": row}
        return (*sample, row)


@dataclass
class RowSource(PairSource):
    """Pairs that are rows: the dataset gives the row number, all else is looked up by it."""

    where: str
    ids: Tensor  # (N,)
    codes: Tensor  # (N, C)
    codebook: CodeBook
    columns: Mapping[str, Sequence[str]]  # what `describe` returns, of all rows
    identity: str
    num_pairs: int | None = None
    remarks: Sequence[str] = ()

    def check_one_step(self, args: Any) -> RowSource:
        """Refuse fewer rows than one optimizer step takes: open_clip would train on nothing."""
        processes = process_count()
        if len(self.ids) < args.batch_size * args.accum_freq * processes:
            raise UsageError(
                f"{self.where} holds {len(self.ids)} pairs, fewer than one step takes "
                f"(--batch-size {args.batch_size} x --accum-freq {args.accum_freq} x "
                f"{processes} process{'es' * (processes > 1)})"
            )
        return self

    def attach(self, loader: Any) -> None:
        """Make the loader's dataset give row numbers."""
        if len(loader.dataset) != len(self.ids):
            raise UsageError(
                f"{self.where}: read {len(self.ids)} rows, but open_clip reads "
                f"{len(loader.dataset)}; is it quoted or separated in an unusual way?"
            )
        # DataLoader refuses a new dataset after construction, because its samplers know the old
        # one's length; the wrapper has the same length and the same samples.
        vars(loader)["dataset"] = IndexedDataset(loader.dataset, self.where)

    def take(self, batch: Sequence[Any]) -> tuple[tuple[Any, ...], PairBatch]:
        """Take the row numbers off the batch."""
        *pair, rows = batch
        deep = rows < 0
        rows = torch.where(deep, ~rows, rows)
        if self.deep is None and deep.any():
            row = int(rows[deep][0])
            self.deep = f"{self.where}: row {row + 1}: image {self.columns['file'][row]!r}"
        return tuple(pair), PairBatch(self.ids[rows], self.codes[rows])

    def end_epoch(self, epoch: int, report: MinerReport | None) -> FlagRates:
        """Return the flag rates of all pairs seen so far that are rows."""
        if report is None:
            return {}
        rows = self._rows_of(report.ids)
        flagged = report.kind[rows >= 0] != "clean"
        codes = self.codes.numpy()[rows[rows >= 0]]
        return flag_rates(count_flagged(flagged, codes, self.codebook), self.codebook)

    def describe(self, ids: IntArray) -> dict[str, Sequence[object]]:
        """Return the cells of the rows; nothing for a lost pair."""
        rows = self._rows_of(ids)
        return {
            name: [of_row[row] if row >= 0 else "" for row in rows]
            for name, of_row in self.columns.items()
        }

    def _rows_of(self, ids: IntArray) -> IntArray:
        """Return the row of each id, -1 where it is not here: a resumed run may have lost it."""
        known = self.ids.numpy()
        order = np.argsort(known, kind="stable")
        rows = order[np.searchsorted(known, ids, sorter=order).clip(max=len(known) - 1)]
        return np.where(known[rows] == ids, rows, -1)


def table_source(args: Any, options: FairOptions) -> PairSource:
    """Return the rows of the training CSV, which is read once more than open_clip reads it.

    Ids are the row numbers, which name pairs as long as the rows are the same, or the column
    ``--fair-id-key``; groups the columns ``--fair-attributes``.
    """
    table, id_key = read_pairs(args.train_data, args), options.fair_id_key
    codes, book = read_groups(table, options)
    with usage_errors():
        ids = torch.from_numpy(pair_ids(table, id_key))
    names = {"file": args.csv_img_key, "caption": args.csv_caption_key}
    digest = hashlib.sha256()
    for column in names.values():
        cells = (cell.strip() for cell in table.column(column))
        digest.update("\n".join(cells).encode("utf-8", "surrogatepass"))
    rows = f"{len(table)} rows {digest.hexdigest()[:12]}"
    names |= {attribute_column(name): name for name in book.labels}
    columns = {name: table.column(column) for name, column in names.items()}
    naming = (rows, len(ids)) if id_key is None else ("named by their ids", None)
    source = RowSource(args.train_data, ids, torch.from_numpy(codes), book, columns, *naming)
    source.remarks = empty_captions(table, args.csv_caption_key) + group_remarks(table, codes, book)
    return source.check_one_step(args)


def synthetic_source(args: Any, options: FairOptions) -> PairSource:
    """Return open_clip's synthetic data set, in which all pairs are alike: for measuring speed.

    Ids are row numbers. There are no attributes to read; where labels are given with
    ``--fair-attributes`` they are dealt out to the rows in turn.
    """
    count = args.train_num_samples
    if not count or count < 1:
        raise UsageError(
            f"--dataset-type synthetic needs --train-num-samples of 1 or more, got {count}"
        )
    bare = [name for name in options.fair_attributes if name not in options.fair_labels]
    if bare:
        raise UsageError(
            f"--fair-attributes {bare[0]}: synthetic pairs have no attributes; give labels to "
            f"be dealt out to them ({bare[0]}=a,b), or use --fair-loss dbpm alone"
        )
    if options.fair_id_key is not None:
        raise UsageError(
            f"--fair-id-key {options.fair_id_key}: synthetic pairs have no keys; drop the flag"
        )
    labels = dict(options.fair_labels)
    ids = torch.arange(count)
    codes = [ids % len(of_one) for of_one in labels.values()]
    by_row = torch.stack(codes, dim=1) if codes else ids.new_empty(count, 0)
    columns = {
        attribute_column(name): [of_one[row % len(of_one)] for row in range(count)]
        for name, of_one in labels.items()
    }
    where, name = "the synthetic data set", f"{count} synthetic pairs"
    source = RowSource(where, ids, by_row, CodeBook(labels), columns, name, count)
    return source.check_one_step(args)
