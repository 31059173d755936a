"""Zero-shot evaluation from the command line: `python -m fairclip_losses.evaluate`.

Reads a checkpoint of an open_clip training and a table of images, prints every fairness metric with
its interval, and writes fairness.json, fairness.csv and predictions.csv. Whatever the user can put
right is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from .data import read_table, write_table, write_text
from .errors import one_line
from .evaluation.zero_shot import Preprocess, Tokenizer, ZeroShotTask, evaluate_task

PROGRAM = "fairclip_losses.evaluate"

# What decides how open_clip builds a model and its image transform, besides the model's name.
_MODEL_OPTIONS = (
    *("force_quick_gelu", "force_custom_text", "force_image_size", "force_context_length"),
    *("image_mean", "image_std", "image_interpolation", "image_resize_mode"),
)
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 for a mistake in what it was given, else 1."""
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        try:
            _run(options)
        except Exception as error:
            if options.debug:
                raise
            expected = isinstance(error, ValueError | OSError)
            kind = "" if expected else "unexpected "
            hint = "" if expected else " (--debug shows the traceback)"
            print(f"{PROGRAM}: error: {kind}{one_line(error)}{hint}", file=sys.stderr)
            return 2 if expected else 1
    return 0


def _run(options: argparse.Namespace) -> None:
    # Everything that needs no model comes first: a typing error should not cost its loading.
    checkpoint = Path(options.checkpoint)
    if not checkpoint.is_file():
        raise ValueError(f"no checkpoint file {options.checkpoint!r}")
    settings = read_run_settings(checkpoint)
    model_name = options.model or settings.get("model")
    if not model_name:
        raise ValueError(
            f"no params.txt of a training run at {_params_file(checkpoint)}: "
            f"say which model this is with --model"
        )
    device = _device(options.device)
    task = ZeroShotTask.from_table(
        read_table(options.data, options.csv_separator),
        label=options.label,
        prompts=options.prompts,
        attributes=options.attributes,
        image_key=options.csv_img_key,
    )
    output = Path(options.output) if options.output else checkpoint.parent
    output.mkdir(parents=True, exist_ok=True)

    model, preprocess, tokenizer = load_model(
        model_name, checkpoint, device=device, precision=options.precision, settings=settings
    )
    same = ("batch_size", "workers", "threshold", "n_bootstrap", "confidence", "seed")
    how = {name: getattr(options, name) for name in same}
    how |= {"device": device, "input_dtype": _PRECISIONS[options.precision]}
    report, predictions = evaluate_task(model, preprocess, tokenizer, task, **how)
    asked = {name: getattr(options, name) for name in ("checkpoint", "data", "label", "precision")}
    about = {"model": model_name, **asked, "classes": task.classes, "prompts": task.prompts}
    content = json.dumps({**about, **report.to_dict()}, indent=2, ensure_ascii=False)
    write_text(output / "fairness.json", content + "\n")
    rows = report.to_rows()
    write_table(output / "fairness.csv", list(rows[0]), [list(row.values()) for row in rows])
    predictions.to_csv(output / "predictions.csv")
    print(f"{model_name}, {options.checkpoint}\n{report.table()}")
    print(f"\nwritten to {output}: fairness.json, fairness.csv, predictions.csv")


def load_model(
    name: str,
    checkpoint: str | Path,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    settings: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Preprocess, Tokenizer]:
    """Build an open_clip model, its inference transform and its tokenizer; load a checkpoint.

    `name` is a built-in name of open_clip or local-dir:PATH, `checkpoint` the file with the
    weights, `precision` fp32, bf16 or fp16. `settings` are those of the training run
    (`read_run_settings`): image size and normalisation and the other options that change what the
    same weights compute.

    Raises:
        ValueError: a model that open_clip cannot build, a file that is no checkpoint, or weights of
            another model.
    """
    import open_clip

    settings = settings or {}
    weights = load_weights(checkpoint)
    kwargs = {key: settings[key] for key in _MODEL_OPTIONS if settings.get(key) is not None}
    size = kwargs.get("force_image_size")
    if isinstance(size, list | tuple) and len(size) == 1:
        kwargs["force_image_size"] = size[0]
    # The normalisation of a pretrained tag is part of the run, though its weights are not needed.
    tag = settings.get("pretrained") or ""
    pretrained = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    for key in ("mean", "std", "interpolation", "resize_mode"):
        if pretrained.get(key) is not None:
            kwargs.setdefault(f"image_{key}", pretrained[key])
    if any(key.endswith("logit_bias") for key in weights):
        kwargs["init_logit_bias"] = 0.0

    # open_clip warns that the weights are random, which they are until the next statement.
    logging.disable(logging.WARNING)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name,
            precision=precision,
            device=device,
            output_dict=True,
            pretrained_hf=False,
            **kwargs,
        )
        tokenizer = open_clip.get_tokenizer(name, context_length=kwargs.get("force_context_length"))
    except Exception as error:
        raise ValueError(f"open_clip cannot build model {name!r}: {one_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    _fill(model, weights, f"{checkpoint}: expected the weights of {name!r}, got")
    model.eval()
    return model, preprocess, tokenizer


def load_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """Read the weights out of a checkpoint file: its "state_dict", or the file as a whole.

    Nothing in the file is executed (`weights_only`). The "module." of distributed training is taken
    off the names.

    Raises:
        ValueError: no such file, or one that holds no weights.
    """
    try:
        # The learning rate that open_clip leaves in the optimizer's state is a NumPy number: let
        # through what a pickled one is made of, wherever this NumPy keeps it.
        number: Any = np.float64(0).__reduce__()[0]
        with torch.serialization.safe_globals([number, np.dtype, type(np.dtype(np.float64))]):
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint file {str(checkpoint)!r}") from None
    except Exception as error:
        raise ValueError(f"{checkpoint}: not a checkpoint that torch.load can read") from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    values = weights.values() if isinstance(weights, dict) else ()
    if weights is None or not values or not all(isinstance(value, Tensor) for value in values):
        raise ValueError(f'{checkpoint}: expected model weights under "state_dict", got none')
    return {str(key).removeprefix("module."): value for key, value in weights.items()}


def read_run_settings(checkpoint: str | Path) -> dict[str, Any]:
    """Read the params.txt of the run that wrote RUN/checkpoints/NAME.pt; empty if there is none."""
    try:
        lines = _params_file(checkpoint).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    settings: dict[str, Any] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def _params_file(checkpoint: str | Path) -> Path:
    return Path(checkpoint).absolute().parent.parent / "params.txt"


def _fill(model: nn.Module, weights: Mapping[str, Tensor], complaint: str) -> None:
    """Load weights that must fit exactly; say in one line how they do not."""
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    foreign = [key for key in weights if key not in own]
    # A scalar parameter may have been stored as a vector of one, as some distributed modes need.
    fitted = {
        key: value.reshape(own[key].shape) if value.numel() == own[key].numel() == 1 else value
        for key, value in weights.items()
        if key in own
    }
    reshaped = [key for key, value in fitted.items() if value.shape != own[key].shape]
    for keys, what in ((missing, "missing"), (foreign, "unknown"), (reshaped, "of other shape")):
        if keys:
            raise ValueError(f"{complaint} {len(keys)} {what}, such as {keys[0]!r}")
    model.load_state_dict(fitted)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        raise ValueError(f"cannot use device {name!r}: {one_line(error)}") from error
    return device


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Evaluate a CLIP checkpoint zero-shot: group fairness metrics with intervals.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="checkpoint of an open_clip training")
    add("--data", required=True, metavar="FILE", help="table of images with a header line")
    add("--label", required=True, metavar="COLUMN", help="column of the true class")
    add("--prompts", required=True, nargs="+", metavar="TEXT", help="one prompt per class")
    add("--attributes", required=True, nargs="+", metavar="COLUMN", help="protected attributes")
    add("--model", help="model name or local-dir:PATH (default: that of the run's params.txt)")
    add("--csv-img-key", default="filepath", metavar="COLUMN", help="column of the image files")
    add("--csv-separator", default="\t", metavar="CHAR", help="between the cells (default: tab)")
    add("--batch-size", type=int, default=64, metavar="N", help="images per forward pass")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--precision", default="fp32", choices=list(_PRECISIONS), help="of the model")
    add("--threshold", type=float, default=0.5, help="positive from here on, with two classes")
    add("--bootstrap", dest="n_bootstrap", type=int, default=1000, metavar="N", help="resamples")
    add("--confidence", type=float, default=0.95, help="coverage of the intervals")
    add("--seed", type=int, default=0, help="of the resampling")
    add("--output", metavar="DIR", help="where to write (default: beside the checkpoint)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"{PROGRAM}: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
