"""Zero-shot fairness metrics on the validation set after each of open_clip's evaluations."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import torch

from ..errors import UsageError, usage_errors
from ..evaluation.report import FairnessReport
from ..evaluation.zero_shot import ZeroShotTask, evaluate_task
from .csv_pairs import is_read_as, name_rows, read_groups, read_pairs
from .events import Callback, TrainState
from .flags import FairOptions
from .pair_reports import WarnOnce, log_scalars

log = logging.getLogger(__name__)


class FairEvaluationCallback(Callback):
    """Classifies the validation images by the prompts and logs AUC, ES-AUC, DPD and DEOdds.

    Figures during training have no intervals; ``python -m fairclip_losses.evaluate`` gives them.
    One JSON line an evaluation goes to ``fair_results.jsonl`` beside the checkpoints. Training
    draws the same random numbers with and without it.
    """

    task: ZeroShotTask  # from ARGS_PARSED on

    def __init__(self, options: FairOptions) -> None:
        self.options = options
        self._warn = WarnOnce("Fair Eval")

    def on_args_parsed(self, state: TrainState) -> None:
        """Read and check the validation table."""
        args, options = state.args, self.options
        if not is_read_as("csv", args.val_data, args):
            raise UsageError(
                "--fair-eval-label needs --val-data FILE.csv or .tsv: it "
                "takes the validation pairs from a table (--dataset-type csv or auto), got "
                f"--val-data {args.val_data!r} --dataset-type {args.dataset_type}"
            )
        assert options.fair_eval_label is not None  # the callback exists because of it
        table = read_pairs(args.val_data, args)
        _, codebook = read_groups(table, options)
        with usage_errors():
            self.task = ZeroShotTask.from_table(
                table,
                label=options.fair_eval_label,
                prompts=options.fair_eval_prompts,
                attributes=options.fair_attributes,
                codebook=codebook,
                others_unknown=options.fair_others_unknown,
                image_key=args.csv_img_key,
            )

    def on_data_ready(self, state: TrainState) -> None:
        """Say what is to be said of the groups, now that open_clip has its log."""
        self._warn(*self.task.remarks)
        # With the fair loss the training data are its own to wrap.
        names = ("val",) if self.options.fair_loss else ("train", "val")
        name_rows(state.data, state.args, *names)

    def on_eval_end(self, state: TrainState) -> None:
        """Evaluate the model that open_clip has just evaluated."""
        args = state.args
        # Whether open_clip has evaluated on its validation data, by its own rule.
        every, is_last = args.val_frequency, state.epoch == args.epochs
        if args.rank != 0 or not (every and (state.epoch % every == 0 or is_last)):
            return
        model = getattr(state.model, "_orig_mod", state.model)
        model = getattr(model, "module", model)
        weight = next(p for p in model.parameters() if p.is_floating_point())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            report, _ = evaluate_task(
                model,
                state.preprocess[1],
                state.tokenizer,
                self.task,
                batch_size=args.batch_size,
                device=torch.device(args.device),
                input_dtype=weight.dtype,
                n_bootstrap=0,
            )
        self._warn(*(str(warning.message) for warning in caught))
        scalars = _scalars(report)
        shown = "\t".join(f"{name}: {value:.4f}" for name, value in scalars.items())
        log.info("Fair Eval Epoch: %d %s", state.epoch, shown)
        # open_clip counts its TensorBoard evaluations in epochs and its W&B ones in steps.
        loader = state.data["train"].dataloader if "train" in state.data else None
        steps = loader.num_batches // args.accum_freq * state.epoch if loader is not None else None
        log_scalars(
            state, {f"val/fair/{k}": v for k, v in scalars.items()}, state.epoch, wandb_step=steps
        )
        if args.save_logs:
            line = json.dumps({"epoch": state.epoch, **scalars})
            with open(Path(args.checkpoint_path) / "fair_results.jsonl", "a") as file:
                file.write(line + "\n")


def _scalars(report: FairnessReport) -> dict[str, float]:
    """Return the report's defined figures by a name such as ``group=minority/auc``."""
    scalars: dict[str, float] = {}
    for row in report.to_rows():
        where = f"{row['attribute']}={row['group']}" if row["group"] else row["attribute"]
        if row["value"] is not None:
            name = f"{where}/{row['metric']}" if where else str(row["metric"])
            scalars[name] = float(row["value"])
    return scalars
