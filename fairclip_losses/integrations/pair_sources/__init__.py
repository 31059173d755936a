"""Where the training pairs come from: each source makes the host's loader carry ids and groups.

table.py   rows of a CSV file, and of the synthetic data set
shards.py  webdataset shards, streamed
"""

from __future__ import annotations

from typing import Any

from ...errors import UsageError
from ..fair_options import FairOptions
from ..pair_files import is_table
from .base import PairBatch, PairSource
from .shards import ShardSource
from .table import SyntheticSource, TableSource

__all__ = ["PairBatch", "PairSource", "pair_source"]


def pair_source(args: Any, options: FairOptions) -> PairSource:
    """Return the source of the pairs that the host will train on, after checking its data.

    Raises:
        UsageError: data that the host cannot take its pairs from, or that do not fit the options.
    """
    if args.dataset_type == "synthetic":
        return SyntheticSource(args, options)
    if is_table(args.train_data, args):
        return TableSource(args, options)
    by_name = args.dataset_type == "auto" and str(args.train_data).endswith(".tar")
    if args.train_data and (args.dataset_type == "webdataset" or by_name):
        return ShardSource(args, options)
    raise UsageError(
        "--fair-loss trains on a table (--train-data FILE.csv or .tsv), on webdataset shards "
        "(SHARDS.tar) or with --dataset-type synthetic, got "
        f"--train-data {args.train_data!r} --dataset-type {args.dataset_type}"
    )
