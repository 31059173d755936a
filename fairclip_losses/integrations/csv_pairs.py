"""Where training pairs come from, and the pairs in rows: CSV files and synthetic data sets."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import CodeBook, Table, encode_attributes, pair_ids, read_table
from ..data.groups import IntArray
from ..errors import UsageError, usage_errors
from ..miners import MinerReport
from .flags import FairOptions
from .pair_reports import FlagRates, attribute_column, count_flagged, flag_rates

PREFIX = "fair_"
"""Prefix of the keys that ids and groups have in a batch that is a dict."""


class PairBatch(NamedTuple):
    """What travels beside a batch of B pairs, on the CPU."""

    ids: Tensor  # (B,) int64
    groups: Tensor  # (B, C) int64 group codes, -1 unknown


class PairSource(ABC):
    """A source of training pairs that knows each pair's id and groups.

    The data are checked when it is made, before open_clip builds its model. Then, in this order::

        source.attach(loader)                         # the loader now carries the metadata
        for each epoch:
            for batch in loader:
                pair, metadata = source.take(batch)   # open_clip gets the pair
            source.end_epoch(report)                  # in every process
            source.describe(ids)                      # in the first process

    Attributes:
        codebook: what the group codes mean, the same in every process.
        num_pairs: number of pairs where their ids are 0..num_pairs-1, None for any int64 ids.
    """

    codebook: CodeBook
    num_pairs: int | None = None

    @abstractmethod
    def attach(self, loader: Any) -> None:
        """Make open_clip's training loader carry ids and groups beside its pairs.

        Raises:
            UsageError: the loader is not of the data that were checked, or is not known.
        """

    @abstractmethod
    def take(self, batch: Sequence[Any]) -> tuple[tuple[Any, ...], PairBatch]:
        """Return the batch as open_clip expects it, and what its last item, our own, says."""

    @abstractmethod
    def identity(self) -> str:
        """Return what the ids depend on: two runs with the same text name the same pairs alike."""

    @abstractmethod
    def end_epoch(
        self, epoch: int, report: MinerReport | None, *, everything: bool = False
    ) -> FlagRates:
        """End an epoch, in every process; return the flag rates where the report is given.

        Args:
            epoch: the epoch that has ended, from 0.
            report: the miner's report in the first process; None in the others, and without one.
            everything: prepare `describe` for all pairs, not only for the flagged ones.
        """

    @abstractmethod
    def describe(self, ids: IntArray) -> dict[str, Sequence[object]]:
        """Return by column name what is known of each pair for those who look for it."""


def is_table(path: str | None, args: Any) -> bool:
    """Whether open_clip will read a data path as a CSV or TSV file."""
    by_name = args.dataset_type == "auto" and str(path).endswith((".csv", ".tsv"))
    return bool(path) and (args.dataset_type == "csv" or by_name)


def read_pairs(path: str, args: Any) -> Table:
    """Read a table of pairs and see that open_clip can read it too.

    Raises:
        UsageError: no such file, no table, a missing column, an image that is not there, or white
            space that open_clip would take as it is.
    """
    names = (args.csv_img_key, args.csv_caption_key)
    with usage_errors():
        table = read_table(path, args.csv_separator)
        try:
            images, _ = (table.column(name) for name in names)
        except ValueError as error:
            only = next(iter(table.columns))
            hint = "; is it --csv-separator , ?" if len(table.columns) == 1 and "," in only else ""
            raise ValueError(f"{error} (see --csv-img-key, --csv-caption-key){hint}") from None
        for name in names:
            if table.padded.get(name) == 0:
                raise ValueError(
                    f"{path}: the name of column {name!r} has white space around it, which is a "
                    "part of it for open_clip; take it off"
                )
        if row := table.padded.get(names[0]):
            raise ValueError(
                f"{path}: row {row}: white space around the image file {images[row - 1]!r}, which "
                "is a part of its name for open_clip; take it off"
            )
        for row, image in enumerate(images, start=1):
            if not os.path.isfile(image):
                raise ValueError(f"{path}: row {row}: no image file {image!r}")
    return table


def read_groups(table: Table, options: FairOptions) -> tuple[IntArray, CodeBook]:
    """Return the codes (N, C) of ``--fair-attributes``, by the labels given or those there are.

    Raises:
        UsageError: a column that is missing or holds no groups, or a value that is no label.
    """
    labels: dict[str, tuple[str, ...]] = {}
    codes = [np.empty((len(table), 0), dtype=np.int64)]  # bad pair mining alone goes without
    with usage_errors():
        for name in options.fair_attributes:
            given = options.fair_labels.get(name)
            column, book = encode_attributes(
                table,
                [name],
                None if given is None else CodeBook({name: given}),
                others_unknown=options.fair_others_unknown,
            )
            codes.append(column)
            labels |= book.labels
    return np.hstack(codes), CodeBook(labels)


class IndexedDataset(Dataset[Any]):
    """A dataset of pairs, tuples or dicts, that gives each sample's row number beside it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        sample = self.inner[index]
        if isinstance(sample, Mapping):
            return {**sample, f"{PREFIX}row": index}
        return (*sample, index)


class RowSource(PairSource):
    """Pairs that are rows: the dataset gives the row number, ids and groups are looked up by it."""

    def __init__(
        self, args: Any, where: str, ids: Tensor, codes: Tensor, codebook: CodeBook
    ) -> None:
        self.where = where
        self.ids = ids
        self.codes = codes
        self.codebook = codebook
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if len(ids) < args.batch_size * args.accum_freq * processes:
            raise UsageError(  # open_clip would train on nothing
                f"{where} holds {len(ids)} pairs, fewer than one step takes "
                f"(--batch-size {args.batch_size} x --accum-freq {args.accum_freq} x "
                f"{processes} process{'es' * (processes > 1)})"
            )

    def attach(self, loader: Any) -> None:
        """Make the loader's dataset give row numbers."""
        if len(loader.dataset) != len(self.ids):
            raise UsageError(
                f"{self.where}: read {len(self.ids)} rows, but open_clip reads "
                f"{len(loader.dataset)}; is it quoted or separated in an unusual way?"
            )
        # DataLoader refuses a new dataset after construction, because its samplers know the old
        # one's length; the wrapper has the same length and the same samples.
        vars(loader)["dataset"] = IndexedDataset(loader.dataset)

    def take(self, batch: Sequence[Any]) -> tuple[tuple[Any, ...], PairBatch]:
        """Take the row numbers off the batch."""
        *pair, rows = batch
        return tuple(pair), PairBatch(self.ids[rows], self.codes[rows])

    def rows_of(self, ids: IntArray) -> IntArray:
        """Return the row of each id, -1 where it is not here: a resumed run may have lost it."""
        known = self.ids.numpy()
        order = np.argsort(known, kind="stable")
        places = np.searchsorted(known, ids, sorter=order).clip(max=len(known) - 1)
        rows = order[places]
        return np.where(known[rows] == ids, rows, -1)

    def end_epoch(
        self, epoch: int, report: MinerReport | None, *, everything: bool = False
    ) -> FlagRates:
        """Return the flag rates of all pairs seen so far that are rows."""
        if report is None:
            return {}
        rows = self.rows_of(report.ids)
        here = rows >= 0
        flagged = report.kind[here] != "clean"
        codes = self.codes.numpy()[rows[here]]
        return flag_rates(count_flagged(flagged, codes, self.codebook), self.codebook)


class TableSource(RowSource):
    """The rows of the training CSV, which is read once more than open_clip reads it.

    Ids are the row numbers, or the column ``--fair-id-key``; groups the columns
    ``--fair-attributes``.
    """

    def __init__(self, args: Any, options: FairOptions) -> None:
        self.table = table = read_pairs(args.train_data, args)
        self.pair_columns = (args.csv_img_key, args.csv_caption_key)
        self.id_key = options.fair_id_key
        codes, codebook = read_groups(table, options)
        with usage_errors():
            ids = torch.from_numpy(pair_ids(table, self.id_key))
        super().__init__(args, args.train_data, ids, torch.from_numpy(codes), codebook)
        self.num_pairs = len(ids) if self.id_key is None else None

    def identity(self) -> str:
        """Row numbers name pairs as long as the rows are the same; ids of their own always do."""
        if self.id_key is not None:
            return "named by their ids"
        digest = hashlib.sha256()
        for column in self.pair_columns:
            digest.update("\n".join(self.table.column(column)).encode())
        return f"{len(self.table)} rows {digest.hexdigest()[:12]}"

    def describe(self, ids: IntArray) -> dict[str, Sequence[object]]:
        """Return image file, caption and the cells of the attributes; nothing for a lost pair."""
        rows = self.rows_of(ids)
        image, caption = self.pair_columns
        columns = {"file": image, "caption": caption}
        columns |= {attribute_column(name): name for name in self.codebook.labels}
        cells = {name: self.table.column(column) for name, column in columns.items()}
        return {
            name: [of_row[row] if row >= 0 else "" for row in rows]
            for name, of_row in cells.items()
        }


class SyntheticSource(RowSource):
    """open_clip's synthetic data set, in which all pairs are alike: for measuring speed.

    Ids are row numbers. There are no attributes to read; where labels are given with
    ``--fair-attributes`` they are dealt out to the rows in turn.
    """

    def __init__(self, args: Any, options: FairOptions) -> None:
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
        book = CodeBook(dict(options.fair_labels))
        ids = torch.arange(count)
        columns = [ids % groups for groups in book.num_groups.values()]
        codes = torch.stack(columns, dim=1) if columns else ids.new_empty(count, 0)
        super().__init__(args, "the synthetic data set", ids, codes, book)
        self.num_pairs = count

    def identity(self) -> str:
        """Return the number of pairs."""
        return f"{len(self.ids)} synthetic pairs"

    def describe(self, ids: IntArray) -> dict[str, Sequence[object]]:
        """Return the labels; nothing else tells synthetic pairs apart."""
        codes = self.codes.numpy()[ids]
        return {
            attribute_column(name): [labels[code] for code in codes[:, column]]
            for column, (name, labels) in enumerate(self.codebook.labels.items())
        }
