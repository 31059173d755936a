"""The fair loss as a training callback: ids and groups in, flags, logs and saved state out."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import CodeBook, Table, encode_attributes, pair_ids
from ..distributed import Processes
from ..errors import UsageError, usage_errors
from ..losses import FairLoss
from ..miners import BadPairMiner, EpochSummary, MinerReport
from ..presets import build_fair_loss
from .events import Callback, TrainState
from .flags import FairOptions
from .logs import log_scalars
from .pair_files import FlagRates, flag_rates, is_table, read_pairs, write_pairs

log = logging.getLogger(__name__)

_MINER = "miner."  # before the names of its state in the loss's


@contextlib.contextmanager
def _unfit() -> Iterator[None]:
    """Say in one line that a saved state does not fit."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"the saved fair-loss state does not fit this run: {' '.join(str(error).split())}"
        ) from None


class IndexedDataset(Dataset[Any]):
    """A dataset of (image, text) that gives each sample's row number as a third item."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*self.inner[index], index)


class FairTrainingCallback(Callback):
    """Trains with `FairLoss`: takes hold of the data, the loss and the end of each epoch.

    The training CSV is read once before anything else, so that a wrong column stops the run before
    the model is built. The dataset yields its row number with every pair; ids and group codes are
    looked up by it, and given to the loss beside what the model returns.
    """

    def __init__(self, options: FairOptions) -> None:
        self.options = options
        self.table: Table | None = None
        self.ids = torch.empty(0, dtype=torch.int64)
        self.codes = torch.empty(0, 0, dtype=torch.int64)
        self.codebook = CodeBook({})
        self.loss: FairLoss | None = None
        self.rates: FlagRates = {}
        self.summary: EpochSummary | None = None
        self._rows: deque[Tensor] = deque()
        self._pair_columns = ("", "")  # of the image and the caption

    def on_args_parsed(self, state: TrainState) -> None:
        """Read the training table and refuse what cannot work."""
        args = state.args
        if not is_table(args.train_data, args):
            raise UsageError(
                "--fair-loss trains on a CSV or TSV file (--train-data FILE.csv), got "
                f"--train-data {args.train_data!r} --dataset-type {args.dataset_type}"
            )
        if args.horovod:
            raise UsageError("--fair-loss does not support --horovod")
        for name in ("batch_size", "accum_freq", "epochs", "log_every_n_steps"):
            if getattr(args, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} must be 1 or more, got {getattr(args, name)}")
        local = args.resume not in (None, "latest") and "://" not in args.resume
        if local and not Path(args.resume).is_file():
            raise UsageError(f"--resume: no checkpoint file {args.resume!r}")
        # The evaluation of fairness, where there is one, reads the validation table itself.
        if not self.options.fair_eval_label and is_table(args.val_data, args):
            read_pairs(args.val_data, args)
        table = read_pairs(args.train_data, args)
        self._pair_columns = (args.csv_img_key, args.csv_caption_key)
        with usage_errors():
            if self.options.fair_attributes:  # bad pair mining alone goes without
                codes, self.codebook = encode_attributes(table, self.options.fair_attributes)
                self.codes = torch.from_numpy(codes)
            else:
                self.codes = torch.empty(len(table), 0, dtype=torch.int64)
            self.ids = torch.from_numpy(pair_ids(table, self.options.fair_id_key))
            self.table = table
            # Built for its checks of the options alone; the real one wraps the host's loss.
            self._build(torch.nn.Identity(), args.epochs)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if len(table) < args.batch_size * args.accum_freq * processes:
            raise UsageError(
                f"{args.train_data} holds {len(table)} pairs, fewer than one step takes "
                f"(--batch-size {args.batch_size} x --accum-freq {args.accum_freq} x "
                f"{processes} process{'es' * (processes > 1)})"
            )

    def on_data_ready(self, state: TrainState) -> None:
        """Make the training set give row numbers."""
        if "train" not in state.data:
            return
        loader = state.data["train"].dataloader
        if self.table is None or len(loader.dataset) != len(self.table):
            raise UsageError(
                f"{state.args.train_data}: read {len(self.table or ())} rows, but open_clip reads "
                f"{len(loader.dataset)}; is it quoted or separated in an unusual way?"
            )
        # DataLoader refuses a new dataset after construction, because its samplers know the old
        # one's length; the wrapper has the same length and the same samples.
        vars(loader)["dataset"] = IndexedDataset(loader.dataset)

    def on_loss_ready(self, state: TrainState) -> None:
        """Wrap the host's loss."""
        with usage_errors():
            self.loss = self._build(state.loss, state.args.epochs)
        state.loss = self.loss
        self.loss.to(state.args.device)
        if state.args.rank == 0:
            log.info("Fair loss: %s", self.loss)

    def on_epoch_start(self, state: TrainState) -> None:
        """Forget rows of a step that the last epoch did not complete; follow the scaler."""
        self._rows = deque(maxlen=state.args.accum_freq)
        # Only now, after a resume that fits: the book is the earlier run's too.
        if state.args.save_logs and state.epoch == state.start_epoch:
            self.codebook.to_json(Path(state.args.checkpoint_path).parent / "fair_codebook.json")
        if self.loss is not None:
            self.loss.follow(state.scaler)

    def on_batch_start(self, state: TrainState) -> None:
        """Take the row numbers off the batch; the host gets its pair."""
        *pair, rows = state.batch
        self._rows.append(rows)
        state.batch = tuple(pair)

    def on_loss_start(self, state: TrainState) -> None:
        """Give the loss the ids and groups of the pairs it sees, in their order."""
        rows = torch.cat(tuple(self._rows))
        device = state.loss_inputs["image_features"].device
        state.loss_inputs["pair_ids"] = self.ids[rows].to(device, non_blocking=True)
        state.loss_inputs["groups"] = self.codes[rows].to(device, non_blocking=True)
        # Under accumulation the loss sees the same pairs once a micro-batch: record them once, and
        # at the end, so that every pass sees the same queue.
        state.loss_inputs["record"] = state.loss_call == state.args.accum_freq - 1

    def on_batch_end(self, state: TrainState) -> None:
        """Log beside the host's own line, at the host's own cadence."""
        args = state.args
        step_in_epoch = state.batch_index // args.accum_freq
        steps = state.data["train"].dataloader.num_batches // args.accum_freq
        completes_step = (state.batch_index + 1) % args.accum_freq == 0
        due = step_in_epoch % args.log_every_n_steps == 0 or step_in_epoch + 1 == steps
        if not (completes_step and due and self.loss is not None and args.rank == 0):
            return
        scalars = self._scalars()
        step = steps * state.epoch + step_in_epoch
        shown = " ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        log.info("Fair Epoch: %d step %d/%d %s", state.epoch, step_in_epoch + 1, steps, shown)
        log_scalars(state, {f"train/fair/{name}": v for name, v in scalars.items()}, step)

    def on_epoch_end(self, state: TrainState) -> None:
        """Refresh the flags and write the flagged pairs."""
        assert self.loss is not None and self.table is not None  # both set before any epoch
        self.summary = self.loss.end_epoch()
        completed = state.epoch + 1
        report = self._report(state.args.rank)
        if state.args.rank != 0:  # what all have, or give to the first; one speaks of it
            return
        if report is not None and self.summary is not None:
            self.rates = flag_rates(report, self.ids, self.codes, self.codebook)
            shown = " ".join(
                f"{attribute}={label} {rate:.1%}"
                for attribute, by_label in self.rates.items()
                for label, rate in by_label.items()
            )
            log.info(
                "Fair Epoch: %d flagged noisy %d faulty %d of %d pairs seen %s",
                state.epoch, self.summary.noisy, self.summary.faulty, self.summary.seen,
                f"| flag rate {shown}" if shown else "",
            )  # fmt: skip
        if not state.args.save_logs:
            return
        folder = Path(state.args.checkpoint_path)
        if report is not None:
            columns = self._pair_columns
            attributes = self.options.fair_attributes
            write_pairs(
                folder / f"flagged_epoch_{completed}.csv", report, self.ids, self.table,
                columns, attributes, flagged_only=True,
            )  # fmt: skip
            if self.options.fair_save_pairs:
                write_pairs(
                    folder / f"pairs_epoch_{completed}.csv", report, self.ids, self.table,
                    columns, attributes, flagged_only=False,
                )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the loss's state, the meaning of the group codes, and the flags it depends on.

        A memory in shards is in the parts instead.
        """
        assert self.loss is not None  # saved after an epoch
        loss = self.loss.state_dict()
        if self._sharded_miner() is not None:
            loss = {name: value for name, value in loss.items() if not name.startswith(_MINER)}
        return {"loss": loss, "labels": self.codebook.labels, "settings": self._settings()}

    def part_state_dict(self) -> dict[str, Any]:
        """Return this process's shard of the memory, where it is in shards."""
        miner = self._sharded_miner()
        return {} if miner is None else {"miner": miner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the loss's state back.

        Raises:
            UsageError: the state is of other settings, groups or parts; the message names them.
        """
        assert self.loss is not None  # loaded before an epoch
        settings = self._settings()
        for flag, saved in state["settings"].items():
            if settings.get(flag) != saved:
                raise UsageError(
                    f"the saved fair-loss state is of {flag} {saved}, this run of {flag} "
                    f"{settings.get(flag)}"
                )
        if state["labels"] != self.codebook.labels:
            raise UsageError(
                f"the saved fair-loss state has the groups {state['labels']}, this run "
                f"{self.codebook.labels}"
            )
        saved = dict(state["loss"])
        whole = {name: saved[name] for name in saved if name.startswith(_MINER)}
        if not whole or self._sharded_miner() is not None:
            # The memory was in shards, or is now: it is put together by `load_shards`.
            own = self.loss.state_dict().items()
            saved |= {name: value for name, value in own if name.startswith(_MINER)}
        with _unfit():
            self.loss.load_state_dict(saved)
            if whole and self._sharded_miner() is not None:
                self._load_shards([{k.removeprefix(_MINER): v for k, v in whole.items()}])

    def load_part_state_dicts(self, parts: Iterable[dict[str, Any]]) -> None:
        """Take this process's pairs out of the shards of a run of any number of processes.

        Raises:
            UsageError: the shards are not of a memory as this run's.
        """
        with _unfit():
            self._load_shards(part["miner"] for part in parts)

    def _load_shards(self, states: Iterable[dict[str, Any]]) -> None:
        if self.loss is not None and self.loss.miner is not None:
            self.loss.miner.load_shards(states)

    def _sharded_miner(self) -> BadPairMiner | None:
        miner = None if self.loss is None else self.loss.miner
        return miner if miner is not None and miner.processes.world_size > 1 else None

    def _build(self, base_loss: torch.nn.Module, epochs: int) -> FairLoss:
        options = self.options
        miner = {
            "warmup_epochs": options.fair_warmup_epochs,
            "noisy_sigma": options.fair_noisy_sigma,
            "faulty_sigma": options.fair_faulty_sigma,
            "processes": Processes.of(base_loss) if options.fair_shard_memory else None,
        }
        fairness = {
            "p": options.fair_p,
            "blur": options.fair_blur,
            "queue_size": options.fair_queue,
        }
        return build_fair_loss(
            base_loss,
            preset=options.fair_preset or "aligned",
            mining="dbpm" in options.fair_loss,
            fairness="sinkhorn" in options.fair_loss,
            num_pairs=len(self.ids) if options.fair_id_key is None else None,
            total_epochs=epochs,
            num_groups=tuple(self.codebook.num_groups.values()) or None,
            miner_options={k: v for k, v in miner.items() if v is not None},
            fairness_options={k: v for k, v in fairness.items() if v is not None},
            fairness_weight=options.fair_weight,
            score=options.fair_score,  # type: ignore[arg-type]  # argparse has checked it
        )

    def _settings(self) -> dict[str, str]:
        """Return what a saved state depends on, by the flags that decide it."""
        options = self.options
        assert self.table is not None  # read before anything else
        # Row numbers name pairs as long as the rows are the same; ids of their own always do.
        pairs = "named by their ids"
        if options.fair_id_key is None:
            digest = hashlib.sha256()
            for column in self._pair_columns:
                digest.update("\n".join(self.table.column(column)).encode())
            pairs = f"{len(self.table)} rows {digest.hexdigest()[:12]}"
        return {
            "--fair-loss": " ".join(options.fair_loss),
            "--fair-preset": options.fair_preset or "aligned",
            "--fair-queue": str(options.fair_queue or 0),
            "--fair-id-key": options.fair_id_key or "not given",
            "--train-data": pairs,
        }

    def _report(self, rank: int) -> MinerReport | None:
        """The first process's report by pair; the published unit has none."""
        if self.loss is None or self.loss.miner is None or self.loss.mining_unit != "pair":
            return None
        if rank != 0 and not self.options.fair_shard_memory:
            return None
        return self.loss.miner.report(to=0)

    def _scalars(self) -> dict[str, float]:
        """What the log shows of the last step; reads values back, so only where the host does."""
        assert self.loss is not None and self.loss.last is not None  # a step has been made
        last = self.loss.last
        scalars: dict[str, float] = {}
        if self.summary is not None:
            scalars["flagged_noisy"] = float(self.summary.noisy)
            scalars["flagged_faulty"] = float(self.summary.faulty)
        if self.loss.miner is not None:
            scalars["batch_reweighted"] = float((last.weights != 1).sum())
        for attribute, by_label in self.rates.items():
            scalars |= {f"flag_rate/{attribute}={k}": rate for k, rate in by_label.items()}
        if last.fairness is not None:
            names = [
                f"distance/{attribute}={label}"
                for attribute, labels in self.codebook.labels.items()
                for label in labels
            ]
            scalars |= zip(names, last.fairness.per_group.tolist(), strict=True)
        return scalars
