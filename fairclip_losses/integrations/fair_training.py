"""The fair loss as a training callback: ids and groups in, flags, logs and saved state out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..data.images import deep_warning
from ..distributed import gather_objects
from ..errors import UsageError, usage_errors
from ..losses import FairLoss
from ..miners import EpochSummary
from ..pair_terms import trains_contrastive
from ..presets import build_fair_loss
from .csv_pairs import (
    PairBatch,
    PairSource,
    is_read_as,
    name_rows,
    process_count,
    read_pairs,
    synthetic_source,
    table_source,
)
from .events import Callback, TrainState
from .flags import FairOptions
from .pair_reports import FlagRates, WarnOnce, log_scalars, rare_groups, write_pairs

log = logging.getLogger(__name__)


def pair_source(args: Any, options: FairOptions) -> PairSource:
    """Return the source of the pairs that open_clip will train on, after checking its data."""
    if args.dataset_type == "synthetic":
        return synthetic_source(args, options)
    if is_read_as("csv", args.train_data, args):
        return table_source(args, options)
    if is_read_as("webdataset", args.train_data, args):
        from .webdataset_pairs import ShardSource

        return ShardSource(args, options)
    raise UsageError(
        "--fair-loss trains on a table (--train-data FILE.csv or .tsv, or of another name with "
        "--dataset-type csv), on webdataset shards (SHARDS.tar) or with --dataset-type synthetic, "
        f"got --train-data {args.train_data!r} --dataset-type {args.dataset_type}"
    )


class FairTrainingCallback(Callback):
    """Trains with `FairLoss`: takes hold of the data, the loss and the end of each epoch.

    A `PairSource` knows the training pairs, checks them before the model is built, and makes the
    loader carry their ids and groups, which the loss is given beside what the model returns.
    """

    source: PairSource  # from ARGS_PARSED on
    loss: FairLoss  # from LOSS_READY on

    def __init__(self, options: FairOptions) -> None:
        self.options = options
        self.rates: FlagRates = {}
        self.summary: EpochSummary | None = None
        self._pairs: deque[PairBatch] = deque()
        self._device: str | None = None  # that asked for, where this open_clip asks
        self._warn = WarnOnce("Fair loss")

    def on_args_parsed(self, state: TrainState) -> None:
        """Look at the training data and refuse what cannot work."""
        args = state.args
        self._device = getattr(args, "device", None)
        for name in ("horovod", "fsdp", "use_naflex"):  # each known to some versions alone
            if getattr(args, name, False):
                raise UsageError(f"--fair-loss does not support --{name.replace('_', '-')}")
        for name in ("batch_size", "accum_freq", "epochs", "log_every_n_steps"):
            if (value := getattr(args, name)) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        captions_alone = "coca" in args.model.lower() and not args.coca_contrastive_loss_weight
        if captions_alone and "dbpm" in self.options.fair_loss:
            raise UsageError(
                "--fair-loss dbpm records the contrastive loss, which "
                "--coca-contrastive-loss-weight 0 does not train; give it a weight, or use "
                "--fair-loss sinkhorn alone"
            )
        local = args.resume not in (None, "latest") and "://" not in args.resume
        if local and not Path(args.resume).is_file():
            raise UsageError(f"--resume: no checkpoint file {args.resume!r}")
        # The evaluation of fairness, where there is one, reads the validation table itself.
        if self.options.fair_eval_label is None and is_read_as("csv", args.val_data, args):
            read_pairs(args.val_data, args)
        self.source = pair_source(args, self.options)
        with usage_errors():
            # Built for its checks of the options alone; the real one wraps open_clip's loss.
            two_each = (2,) * len(self.options.fair_attributes)
            stand_in = torch.nn.Identity()
            vars(stand_in).update(rank=0, world_size=process_count())
            self._build(stand_in, args.epochs, two_each)

    def on_data_ready(self, state: TrainState) -> None:
        """Make the training loader give ids and groups; say what is to be said of the data."""
        args, data = state.args, state.data
        self._warn(*self.source.remarks)
        if "train" in data:
            self.source.attach(data["train"].dataloader)
        name_rows(data, args, "val")

    def on_loss_ready(self, state: TrainState) -> None:
        """Wrap open_clip's loss."""
        with usage_errors():
            num_groups = tuple(self.source.codebook.num_groups.values())
            self.loss = self._build(state.loss, state.args.epochs, num_groups)
        state.loss = self.loss
        self.loss.to(state.args.device)
        if state.args.rank == 0:
            log.info("Fair loss: %s", self.loss)
        self._warn(*self._traps(state))

    def on_epoch_start(self, state: TrainState) -> None:
        """Forget pairs of a step that the last epoch did not complete."""
        self._pairs = deque(maxlen=state.args.accum_freq)
        # Only now, after a resume that fits: the book is the earlier run's too.
        if state.args.save_logs and state.epoch == state.start_epoch:
            book = Path(state.args.checkpoint_path).parent / "fair_codebook.json"
            self.source.codebook.to_json(book)

    def on_batch_start(self, state: TrainState) -> None:
        """Take ids and groups off the batch; open_clip gets its pair."""
        is_sequence = isinstance(state.batch, (tuple, list))
        if not is_sequence or len(state.batch) <= 2:
            raise UsageError(
                "a callback that replaces state.batch must keep its last item, which says whose "
                "pairs they are: expected (images, texts, pairs), got "
                f"{f'{len(state.batch)} items' if is_sequence else type(state.batch).__name__}"
            )
        state.batch, pairs = self.source.take(state.batch)
        self._pairs.append(pairs)
        self._warn_of_deep(self.source.deep)

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
        """Log beside open_clip's own line, as often as it does."""
        args = state.args
        step_in_epoch, within = divmod(state.batch_index, args.accum_freq)
        steps = state.data["train"].dataloader.num_batches // args.accum_freq
        due = step_in_epoch % args.log_every_n_steps == 0 or step_in_epoch + 1 == steps
        if not (within == args.accum_freq - 1 and due and args.rank == 0):
            return
        scalars, step = self._scalars(), steps * state.epoch + step_in_epoch
        shown = " ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        log.info("Fair Epoch: %d step %d/%d %s", state.epoch, step_in_epoch + 1, steps, shown)
        log_scalars(state, {f"train/fair/{name}": v for name, v in scalars.items()}, step)

    def on_epoch_end(self, state: TrainState) -> None:
        """Refresh the flags and write the flagged pairs."""
        self.summary = summary = self.loss.end_epoch()
        # Every process has the same memory; the first speaks of it. The published unit has none.
        report = None
        if state.args.rank == 0 and self.loss.miner is not None and self.loss.mining_unit == "pair":
            report = self.loss.miner.report()
        self._warn_of_deep(*gather_objects(self.source.deep))
        self.rates = self.source.end_epoch(state.epoch, report)
        if report is None or summary is None:
            return
        shown = " ".join(
            f"{attribute}={label} {rate:.1%}"
            for attribute, by_label in self.rates.items()
            for label, rate in by_label.items()
        )
        log.info(
            "Fair Epoch: %d flagged noisy %d faulty %d of %d pairs seen %s",
            state.epoch, summary.noisy, summary.faulty, summary.seen,
            f"| flag rate {shown}" if shown else "",
        )  # fmt: skip
        if state.args.save_logs:
            for name in ("flagged", "pairs")[: 1 + self.options.fair_save_pairs]:
                path = Path(state.args.checkpoint_path) / f"{name}_epoch_{state.epoch + 1}.csv"
                write_pairs(path, report, self.source.describe, flagged_only=name == "flagged")

    def _traps(self, state: TrainState) -> Iterator[str]:
        """Yield what of this run is allowed, and seldom meant."""
        args = state.args
        if not trains_contrastive(self.loss.base_loss):
            yield "the fairness term alone trains the scores that it compares"
        steps = state.data["train"].dataloader.num_batches // args.accum_freq * args.epochs
        warmup = 0 if getattr(args, "skip_scheduler", False) else getattr(args, "warmup", 0)
        if warmup > steps:
            yield (
                f"--warmup {warmup} is longer than the {steps} steps of the run, whose learning "
                f"rate ends at {steps / warmup:.2%} of --lr; give --warmup {steps // 10} or so"
            )
        asked = self._device or str(args.device)
        if asked.split(":")[0] != str(args.device).split(":")[0]:
            yield (
                f"--device {asked} is not there: the run trains on {args.device}; give "
                f"--device {args.device} if that is meant"
            )
        if (term := self.loss.fairness) is not None:
            batch = args.batch_size * args.accum_freq * args.world_size
            least = term.min_group_size - term.queue_size
            rare = rare_groups(self.source.codes.numpy(), self.source.codebook, batch, least)
            if rare:
                shown = ", ".join(rare[:5]) + f" and {len(rare) - 5} more" * (len(rare) > 5)
                yield (
                    f"a group has distance 0 where a batch of {batch} holds fewer than "
                    f"{term.min_group_size} of it, as is to be expected of {shown}; add "
                    f"--fair-queue {batch}, which compares the last {batch} scores of each group"
                )

    def _warn_of_deep(self, *found: str | None) -> None:
        self._warn(*map(deep_warning, filter(None, found)), kind="deep images")

    def state_dict(self) -> dict[str, Any]:
        """Return the loss's state, the meaning of the group codes, and the flags it depends on."""
        return {
            "loss": self.loss.state_dict(),
            "labels": self.source.codebook.labels,
            "settings": self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the loss's state back; a UsageError names settings or groups that differ."""
        needed = ("settings", "labels", "loss")
        if missing := [name for name in needed if not isinstance(state.get(name), dict)]:
            raise UsageError(f"the saved fair-loss state lacks {', '.join(missing)}")
        settings = self._settings()
        for flag, saved in state["settings"].items():
            if settings.get(flag) != saved:
                raise UsageError(
                    f"the saved fair-loss state is of {flag} {saved}, this run of {flag} "
                    f"{settings.get(flag)}"
                )
        if state["labels"] != self.source.codebook.labels:
            raise UsageError(
                f"the saved fair-loss state has the groups {state['labels']}, this run "
                f"{self.source.codebook.labels}"
            )
        try:
            self.loss.load_state_dict(state["loss"])
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"the saved fair-loss state does not fit this run: {' '.join(str(error).split())}"
            ) from None

    def _build(
        self, base_loss: torch.nn.Module, epochs: int, num_groups: tuple[int, ...]
    ) -> FairLoss:
        options = self.options
        return build_fair_loss(
            base_loss,
            preset=options.fair_preset or "aligned",
            mining="dbpm" in options.fair_loss,
            fairness="sinkhorn" in options.fair_loss,
            num_pairs=self.source.num_pairs,
            total_epochs=epochs,
            num_groups=num_groups or None,
            miner_options=_given(
                weighting=options.fair_weighting,
                warmup_epochs=options.fair_warmup_epochs,
                noisy_sigma=options.fair_noisy_sigma,
                faulty_sigma=options.fair_faulty_sigma,
            ),
            fairness_options=_given(
                p=options.fair_p, blur=options.fair_blur, queue_size=options.fair_queue
            ),
            fairness_weight=options.fair_weight,
            fairness_start=options.fair_start_epoch,
            score=options.fair_score,  # type: ignore[arg-type]  # argparse has checked it
        )

    def _settings(self) -> dict[str, str]:
        """Return what a saved state depends on, by the flags that decide it."""
        options = self.options
        queued = {"--fair-score": self.loss.score} if options.fair_queue else {}
        return {
            "--fair-loss": " ".join(options.fair_loss),
            "--fair-preset": options.fair_preset or "aligned",
            "--fair-queue": str(options.fair_queue or 0),
            "--fair-id-key": options.fair_id_key or "not given",
            "--train-data": self.source.identity,
            **queued,
        }

    def _scalars(self) -> dict[str, float]:
        """What the log shows of the last step; reads values back, so only where open_clip does."""
        last = self.loss.last
        assert last is not None  # a step has been made
        scalars: dict[str, float] = {}
        if self.summary is not None:
            scalars["flagged_noisy"] = float(self.summary.noisy)
            scalars["flagged_faulty"] = float(self.summary.faulty)
        if self.loss.miner is not None:
            scalars["batch_reweighted"] = float((last.weights != 1).sum())
        for attribute, by_label in self.rates.items():
            scalars |= {f"flag_rate/{attribute}={k}": rate for k, rate in by_label.items()}
        if last.fairness is not None:
            labels = self.source.codebook.labels.items()
            names = [f"distance/{name}={label}" for name, of_one in labels for label in of_one]
            scalars |= zip(names, last.fairness.per_group.tolist(), strict=True)
        return scalars


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
