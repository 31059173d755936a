"""Pairs in rows: the host's CSV data set, and its synthetic one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...data import CodeBook, pair_ids
from ...data.groups import IntArray
from ...errors import UsageError, usage_errors
from ...miners import MinerReport
from ..fair_options import FairOptions
from ..pair_files import FlagRates, attribute_column, read_groups, read_pairs
from ..samples import with_beside
from .base import PairBatch, PairSource, count_flagged, flag_rates


class IndexedDataset(Dataset[Any]):
    """A dataset of pairs that gives each sample's row number beside it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return with_beside(self.inner[index], fair_row=index)


class RowSource(PairSource):
    """Pairs that are rows: the dataset gives the row number, ids and groups are looked up by it."""

    def __init__(self, where: str, ids: Tensor, codes: Tensor, codebook: CodeBook) -> None:
        self.where = where
        self.ids = ids
        self.codes = codes
        self.codebook = codebook

    def check_one_step(self, args: Any) -> None:
        """Refuse fewer rows than one optimizer step takes: the host would train on nothing."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if len(self.ids) < args.batch_size * args.accum_freq * processes:
            raise UsageError(
                f"{self.where} holds {len(self.ids)} pairs, fewer than one step takes "
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
    """The rows of the training CSV, which is read once more than the host reads it.

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
        super().__init__(args.train_data, ids, torch.from_numpy(codes), codebook)
        self.num_pairs = len(ids) if self.id_key is None else None
        self.check_one_step(args)

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
    """The host's synthetic data set, in which all pairs are alike: for measuring speed.

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
        codes = [ids % groups for groups in book.num_groups.values()]
        super().__init__(
            "the synthetic data set",
            ids,
            torch.stack(codes, dim=1) if codes else ids.new_empty(count, 0),
            book,
        )
        self.num_pairs = count
        self.check_one_step(args)

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
