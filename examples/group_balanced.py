"""A callback that gives every batch as many pairs of one group as of another.

It replaces the training loader that open_clip has made from a CSV file; the first of
--fair-attributes says which groups. With the fair loss or without it:

    PYTHONPATH=examples python -m fairclip_losses.train --train-data train.csv ... \
        --fair-callback group_balanced:GroupBalancedBatches --fair-attributes race

An epoch has as many batches as before, so pairs of a rare group are seen several times in it and
some of a common one not at all. Which batches an epoch has depends on --seed and its number alone:
a resumed run goes on with those that the uninterrupted one would have had.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fairclip_losses.data import encode_attributes, read_table
from fairclip_losses.errors import UsageError
from fairclip_losses.integrations.events import Callback, TrainState


class GroupBalancedSampler(Sampler[list[int]]):
    """Batches of row numbers in which the groups' sizes differ by one at most.

    ``codes`` (N,) is the group of each row; unknown (-1) counts as a group of its own. Each of
    ``world_size`` processes draws the same batches of ``world_size * batch_size`` rows and takes
    its share.
    """

    def __init__(
        self, codes: Tensor, batch_size: int, num_batches: int,
        *, seed: int = 0, rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        self.members = [torch.nonzero(codes == code).flatten() for code in codes.unique()]
        self.batch_size, self.num_batches = batch_size, num_batches
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose whose batches the next pass gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        streams = [_endless(rows, generator) for rows in self.members]
        size, groups = self.batch_size * self.world_size, len(streams)
        for batch in range(self.num_batches):
            # Who gets one more where the groups do not divide the batch goes round.
            first = batch * size % groups
            quotas = [
                size // groups + ((g - first) % groups < size % groups) for g in range(groups)
            ]
            rows = torch.tensor(
                [next(stream) for stream, n in zip(streams, quotas, strict=True) for _ in range(n)]
            )
            rows = rows[torch.randperm(size, generator=generator)]
            yield rows[self.rank :: self.world_size].tolist()


def _endless(rows: Tensor, generator: torch.Generator) -> Iterator[int]:
    """Give the rows in one random order after another."""
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator)].tolist()


class GroupBalancedBatches(Callback):
    """Replaces the training loader by one whose batches are balanced."""

    def __init__(self) -> None:
        self.codes = torch.empty(0, dtype=torch.int64)
        self.sampler: GroupBalancedSampler | None = None

    def on_args_parsed(self, state: TrainState) -> None:
        """Read the groups, so that a wrong column stops the run before the model is built."""
        args = state.args
        if not args.fair_attributes:
            raise UsageError(
                "group_balanced needs --fair-attributes NAME (a column of --train-data)"
            )
        if not args.train_data or args.dataset_type not in ("auto", "csv"):
            raise UsageError("group_balanced needs the CSV file of --train-data to train on")
        try:
            table = read_table(args.train_data, args.csv_separator)
            codes, _ = encode_attributes(table, args.fair_attributes[:1])
        except ValueError as error:  # says what is wrong with the table
            raise UsageError(str(error)) from error
        self.codes = torch.from_numpy(codes)[:, 0]

    def on_data_ready(self, state: TrainState) -> None:
        """Put another loader over the same dataset in the place of open_clip's."""
        args, old = state.args, state.data["train"].dataloader
        self.sampler = GroupBalancedSampler(
            self.codes, args.batch_size, old.num_batches,
            seed=args.seed, rank=args.rank, world_size=args.world_size,
        )  # fmt: skip
        new: Any = DataLoader(
            old.dataset, batch_sampler=self.sampler, num_workers=old.num_workers,
            pin_memory=old.pin_memory, collate_fn=old.collate_fn,
        )  # fmt: skip
        # What open_clip's training loop reads of a loader besides its batches.
        new.num_samples, new.num_batches = old.num_samples, old.num_batches
        state.data["train"].dataloader = new

    def on_epoch_start(self, state: TrainState) -> None:
        """Draw other batches in each epoch."""
        if self.sampler is not None:
            self.sampler.set_epoch(state.epoch)
