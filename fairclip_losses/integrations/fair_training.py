"""The fair loss as a training callback: ids and groups in, flags, logs and saved state out."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..distributed import Processes
from ..errors import UsageError, usage_errors
from ..losses import FairLoss
from ..miners import BadPairMiner, EpochSummary, MinerReport
from ..presets import build_fair_loss
from .events import Callback, TrainState
from .fair_options import FairOptions
from .logs import log_scalars
from .pair_files import FlagRates, is_table, read_pairs, write_pairs
from .pair_sources import PairBatch, PairSource, pair_source

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


class FairTrainingCallback(Callback):
    """Trains with `FairLoss`: takes hold of the data, the loss and the end of each epoch.

    A `PairSource` knows the training pairs, checks them before the model is built, and makes the
    loader carry their ids and groups, which the loss is given beside what the model returns.
    """

    def __init__(self, options: FairOptions) -> None:
        self.options = options
        self.source: PairSource | None = None
        self.loss: FairLoss | None = None
        self.rates: FlagRates = {}
        self.summary: EpochSummary | None = None
        self._pairs: deque[PairBatch] = deque()

    def on_args_parsed(self, state: TrainState) -> None:
        """Look at the training data and refuse what cannot work."""
        args = state.args
        for name in ("horovod", "fsdp", "use_naflex"):  # each known to some versions alone
            if getattr(args, name, False):
                raise UsageError(f"--fair-loss does not support --{name.replace('_', '-')}")
        for name in ("batch_size", "accum_freq", "epochs", "log_every_n_steps"):
            if getattr(args, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} must be 1 or more, got {getattr(args, name)}")
        local = args.resume not in (None, "latest") and "://" not in args.resume
        if local and not Path(args.resume).is_file():
            raise UsageError(f"--resume: no checkpoint file {args.resume!r}")
        # The evaluation of fairness, where there is one, reads the validation table itself.
        if self.options.fair_eval_label is None and is_table(args.val_data, args):
            read_pairs(args.val_data, args)
        self.source = pair_source(args, self.options)
        with usage_errors():
            # Built for its checks of the options alone; the real one wraps the host's loss.
            two_each = (2,) * len(self.options.fair_attributes)
            stand_in = torch.nn.Identity()
            vars(stand_in).update(rank=0, world_size=int(os.environ.get("WORLD_SIZE", "1")))
            self._build(stand_in, args.epochs, two_each)

    def on_data_ready(self, state: TrainState) -> None:
        """Make the training loader give ids and groups."""
        if "train" in state.data:
            self._known_source.attach(state.data["train"].dataloader)

    def on_loss_ready(self, state: TrainState) -> None:
        """Wrap the host's loss."""
        with usage_errors():
            num_groups = tuple(self._known_source.codebook.num_groups.values())
            self.loss = self._build(state.loss, state.args.epochs, num_groups)
        state.loss = self.loss
        self.loss.to(state.args.device)
        if state.args.rank == 0:
            log.info("Fair loss: %s", self.loss)

    def on_epoch_start(self, state: TrainState) -> None:
        """Forget pairs of a step that the last epoch did not complete."""
        self._pairs = deque(maxlen=state.args.accum_freq)
        # Only now, after a resume that fits: the book is the earlier run's too.
        if state.args.save_logs and state.epoch == state.start_epoch:
            book = Path(state.args.checkpoint_path).parent / "fair_codebook.json"
            self._known_source.codebook.to_json(book)

    def on_batch_start(self, state: TrainState) -> None:
        """Take ids and groups off the batch; the host gets its pair.

        Raises:
            UsageError: a callback has taken them off.
        """
        if not isinstance(state.batch, (tuple, list)) or len(state.batch) <= 2:
            got = type(state.batch).__name__
            if isinstance(state.batch, (tuple, list)):
                got = f"{len(state.batch)} items"
            raise UsageError(
                "a callback that replaces state.batch must keep its last item, which says whose "
                f"pairs they are: expected (images, texts, pairs), got {got}"
            )
        state.batch, pairs = self._known_source.take(state.batch)
        self._pairs.append(pairs)

    def on_loss_start(self, state: TrainState) -> None:
        """Give the loss the ids and groups of the pairs it sees, in their order."""
        ids, groups = (torch.cat(parts) for parts in zip(*self._pairs, strict=True))
        device = state.loss_inputs["image_features"].device
        state.loss_inputs["pair_ids"] = ids.to(device, non_blocking=True)
        state.loss_inputs["groups"] = groups.to(device, non_blocking=True)
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
        assert self.loss is not None  # set before any epoch
        source = self._known_source
        self.summary = self.loss.end_epoch()
        completed = state.epoch + 1
        # Every process has the same memory, or gives its part to the first, which speaks of it.
        report = self._report(state.args.rank)
        everything = self.options.fair_save_pairs
        self.rates = source.end_epoch(state.epoch, report, everything=everything)
        if state.args.rank != 0:
            return
        if report is not None and self.summary is not None:
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
            for name in ("flagged", "pairs") if everything else ("flagged",):
                path = folder / f"{name}_epoch_{completed}.csv"
                write_pairs(path, report, source.describe, flagged_only=name == "flagged")

    def state_dict(self) -> dict[str, Any]:
        """Return the loss's state, the meaning of the group codes, and the flags it depends on.

        A memory in shards is in the parts instead.
        """
        assert self.loss is not None  # saved after an epoch
        loss = self.loss.state_dict()
        if self._sharded_miner() is not None:
            loss = {name: value for name, value in loss.items() if not name.startswith(_MINER)}
        return {
            "loss": loss,
            "labels": self._known_source.codebook.labels,
            "settings": self._settings(),
        }

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
        names = ("settings", "labels", "loss")
        missing = [name for name in names if not isinstance(state.get(name), dict)]
        if missing:
            raise UsageError(f"the saved fair-loss state lacks {', '.join(missing)}")
        settings = self._settings()
        for flag, saved in state["settings"].items():
            if settings.get(flag) != saved:
                raise UsageError(
                    f"the saved fair-loss state is of {flag} {saved}, this run of {flag} "
                    f"{settings.get(flag)}"
                )
        if state["labels"] != self._known_source.codebook.labels:
            raise UsageError(
                f"the saved fair-loss state has the groups {state['labels']}, this run "
                f"{self._known_source.codebook.labels}"
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

    @property
    def _known_source(self) -> PairSource:
        assert self.source is not None  # known before anything else
        return self.source

    def _build(
        self, base_loss: torch.nn.Module, epochs: int, num_groups: tuple[int, ...]
    ) -> FairLoss:
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
            num_pairs=self._known_source.num_pairs,
            total_epochs=epochs,
            num_groups=num_groups or None,
            miner_options={k: v for k, v in miner.items() if v is not None},
            fairness_options={k: v for k, v in fairness.items() if v is not None},
            fairness_weight=options.fair_weight,
            score=options.fair_score,  # type: ignore[arg-type]  # argparse has checked it
        )

    def _settings(self) -> dict[str, str]:
        """Return what a saved state depends on, by the flags that decide it."""
        assert self.loss is not None  # saved and loaded with it
        options = self.options
        queued = {"--fair-score": self.loss.score} if options.fair_queue else {}
        return {
            "--fair-loss": " ".join(options.fair_loss),
            "--fair-preset": options.fair_preset or "aligned",
            "--fair-queue": str(options.fair_queue or 0),
            "--fair-id-key": options.fair_id_key or "not given",
            "--train-data": self._known_source.identity(),
            **queued,
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
                for attribute, labels in self._known_source.codebook.labels.items()
                for label in labels
            ]
            scalars |= zip(names, last.fairness.per_group.tolist(), strict=True)
        return scalars
