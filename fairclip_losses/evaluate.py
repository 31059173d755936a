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
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from .data import encode_attributes, read_table, write_table, write_text
from .data.groups import given_attributes, shortened
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
        warnings.showwarning = lambda message, *_, **__: _warn(str(message))
        try:
            _run(options)
        except Exception as error:
            if options.debug:
                raise
            status, text = 2, one_line(error)
            if not isinstance(error, ValueError | OSError):
                status, text = 1, f"unexpected {text} (--debug shows the traceback)"
            print(f"{PROGRAM}: error: {text}", file=sys.stderr)
            return status
    return 0


def _warn(text: str) -> None:
    print(f"{PROGRAM}: warning: {text}", file=sys.stderr)


def _run(options: argparse.Namespace) -> None:
    # Everything that needs no model comes first: a typing error should not cost its loading.
    checkpoint = Path(options.checkpoint)
    if not checkpoint.is_file():
        raise ValueError(f"no checkpoint file {options.checkpoint!r}")
    settings = read_run_settings(checkpoint)
    model_name = options.model or settings.get("model")
    if not model_name:
        where = f"no params.txt of a training run at {_params_file(checkpoint)}"
        raise ValueError(f"{where}: say which model this is with --model")
    device = _device(options.device)
    image_key = options.csv_img_key
    table = read_table(options.data, options.csv_separator, as_open_clip=[image_key])
    names, labels, others = given_attributes(options.attributes, "--attributes")
    _, codebook = encode_attributes(table, names, given=labels, others_unknown=others)
    what: dict[str, Any] = {"attributes": names, "codebook": codebook, "others_unknown": others}
    what |= {"label": options.label, "prompts": options.prompts, "image_key": image_key}
    task = ZeroShotTask.from_table(table, **what)
    output = Path(options.output or checkpoint.parent)
    output.mkdir(parents=True, exist_ok=True)

    model, preprocess, tokenizer = load_model(
        model_name, checkpoint, device=device, precision=options.precision, settings=settings
    )
    same = ("batch_size", "workers", "threshold", "n_bootstrap", "confidence", "seed")
    how = {name: vars(options)[name] for name in same}
    how |= {"device": device, "input_dtype": _PRECISIONS[options.precision]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        report, predictions = evaluate_task(model, preprocess, tokenizer, task, **how)
    remarks = "\n".join(task.remarks)  # some of which the report says again in short
    new = dict.fromkeys(text for w in caught if (text := str(w.message)) not in remarks)
    for line in (*task.remarks, *new):
        _warn(line)
    asked = {name: vars(options)[name] for name in ("checkpoint", "data", "label", "precision")}
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
    match kwargs.get("force_image_size"):
        case [size]:
            kwargs["force_image_size"] = size
    # The normalisation of a pretrained tag is part of the run, though its weights are not needed.
    tag = settings.get("pretrained") or ""
    pretrained = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    for key in ("mean", "std", "interpolation", "resize_mode"):
        if pretrained.get(key) is not None:
            kwargs.setdefault(f"image_{key}", pretrained[key])
    if any(key.endswith("logit_bias") for key in weights):
        kwargs["init_logit_bias"] = 0.0
    kwargs["pretrained_hf"] = False

    # open_clip warns that the weights are random, which they are until `_fill`.
    logging.disable(logging.WARNING)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, precision=precision, device=device, output_dict=True, **kwargs
        )
        tokenizer = open_clip.get_tokenizer(name, context_length=kwargs.get("force_context_length"))
    except Exception as error:
        raise ValueError(f"open_clip cannot build model {name!r}: {one_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    _fill(model, weights, f"{checkpoint}: expected the weights of {name!r}, got")
    return model.eval(), preprocess, tokenizer


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
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f" without running code of its own: it holds {code[1]}" if code else ""
        raise ValueError(f"{checkpoint}: not a checkpoint that torch.load can read{why}") from error
    found = content if isinstance(content, dict) else {}
    weights = found.get("state_dict", found)
    if not _are_weights(weights):
        others = [repr(key) for key, value in found.items() if _are_weights(value)]
        got = f"got them under {', '.join(others)}" if others else "got none"
        there = f"; its keys are {shortened(list(map(str, found)))}" if found else ""
        raise ValueError(f'{checkpoint}: expected model weights under "state_dict", {got}{there}')
    tensors = {key: value for key, value in weights.items() if torch.is_tensor(value)}
    return {str(key).removeprefix("module."): value for key, value in tensors.items()}


def _are_weights(value: object) -> TypeGuard[dict[Any, Any]]:
    # Modules may keep something else among their tensors: FairLoss beside a model in Lightning.
    return isinstance(value, dict) and 2 * sum(map(torch.is_tensor, value.values())) > len(value)


def read_run_settings(checkpoint: str | Path) -> dict[str, Any]:
    """Read the params.txt of the run that wrote RUN/checkpoints/NAME.pt; empty if there is none."""
    try:
        lines = _params_file(checkpoint).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    settings: dict[str, Any] = dict(line.split(": ", 1) for line in lines if ": " in line)
    for name, value in settings.items():
        with suppress(ValueError, SyntaxError):  # what is no literal stays text
            settings[name] = ast.literal_eval(value)
    return settings


def _params_file(checkpoint: str | Path) -> Path:
    return Path(checkpoint).absolute().parent.parent / "params.txt"


def _fill(model: nn.Module, weights: Mapping[str, Tensor], complaint: str) -> None:
    """Load weights that must fit exactly; say in one line how they do not."""
    own = model.state_dict()
    # A scalar parameter may have been stored as a vector of one, as some distributed modes need.
    fitted = {
        key: value.reshape(own[key].shape) if value.numel() == own[key].numel() == 1 else value
        for key, value in weights.items()
        if key in own
    }
    wrong = {
        "missing": [key for key in own if key not in weights],
        "unknown": [key for key in weights if key not in own],
        "of other shape": [key for key, value in fitted.items() if value.shape != own[key].shape],
    }
    for what, keys in wrong.items():
        if keys:
            there = f"; the file has names such as {next(iter(weights))!r}"
            longest = max(keys, key=len)  # no other name ends so by chance
            if what == "missing" and (same := [k for k in weights if k.endswith(f".{longest}")]):
                there = f"; its names begin with {same[0].removesuffix(longest)!r}: take that off"
            raise ValueError(f"{complaint} {len(keys)} {what}, such as {keys[0]!r}{there}")
    model.load_state_dict(fitted)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except Exception as error:
        raise ValueError(f"cannot use device {name!r}: {one_line(error)}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message}\n")  # one line, without the usage


class _WithDefaults(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        said = action.default in (None, argparse.SUPPRESS) or "(default:" in text
        return text if said else f"{text} (default: %(default)s)"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        formatter_class=_WithDefaults,
        description="Evaluate a CLIP checkpoint zero-shot: group fairness metrics with intervals.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="checkpoint of an open_clip training")
    add("--data", required=True, metavar="FILE", help="table of images with a header line")
    add("--label", required=True, metavar="COLUMN", help="column of the true class")
    add("--prompts", required=True, nargs="+", metavar="TEXT", help="one prompt per class")
    add("--attributes", required=True, nargs="+", metavar="COLUMN[=LABEL,...[,*]]",
        help="protected attributes; after = the labels that are groups, with ,* at the end where "
        "any other value is unknown, else it is refused")  # fmt: skip
    add("--model", help="model name or local-dir:PATH (default: that of the run's params.txt)")
    add("--csv-img-key", default="filepath", metavar="COLUMN", help="column of the image files")
    add("--csv-separator", default="\t", metavar="CHAR", help="as for pandas (default: tab)")
    add("--batch-size", type=int, default=64, metavar="N", help="images per forward pass")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: cuda if there is one)")
    add("--precision", default="fp32", choices=list(_PRECISIONS), help="of the model")
    add("--threshold", type=float, default=0.5, help="positive from here on, with two classes")
    add("--bootstrap", dest="n_bootstrap", type=int, default=1000, metavar="N", help="resamples")
    add("--confidence", type=float, default=0.95, help="coverage of the intervals")
    add("--seed", type=int, default=0, help="of the resampling")
    add("--output", metavar="DIR", help="where to write (default: beside the checkpoint)")
    add("--debug", action="store_true", help="show the traceback of an error (default: one line)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
