"""Zero-shot classification of a table of images by a CLIP model, and the fairness report of it.

    Table -> ZeroShotTask -> evaluate_task(model, ...) -> FairnessReport, Predictions

A task is checked when it is made, before a training. Evaluating it does not change the training: it
draws no random numbers from the global generators and leaves the model as it was.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..data.groups import CodeBook, encode_attributes, encode_labels, group_remarks
from ..data.images import check_images, deep_warning, is_deep
from ..data.tables import IntArray, Table, write_table
from ..errors import reason
from ..validation import check_integer
from .group_metrics import FloatArray, decide
from .report import FairnessReport, check_settings, fairness_report

# A model that knows nothing stays above it in all but small samples.
CROSSED_AUC = 0.4

Preprocess = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class ZeroShotTask:
    """What to classify: N images, the class of each, one prompt per class, and the groups.

    Made by `from_table`, which checks everything that can be checked without a model; `remarks`
    are lines that it has to say of groups too few, too many or too small.
    """

    files: list[str]
    labels: IntArray
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    groups: IntArray
    codebook: CodeBook
    remarks: tuple[str, ...] = ()

    @classmethod
    def from_table(
        cls,
        table: Table,
        *,
        label: str,
        prompts: Sequence[str],
        attributes: Sequence[str],
        codebook: CodeBook | None = None,
        others_unknown: Collection[str] = (),
        image_key: str = "filepath",
    ) -> ZeroShotTask:
        """Make a task from the columns of a table.

        `label` is the column of the true class, coded by `encode_labels`: prompt k is class k.
        `attributes` are those of the protected attributes, coded by `encode_attributes` with
        `codebook` and `others_unknown`, `image_key` that of the image files.

        Raises:
            ValueError: fewer than two prompts, one twice, a number of prompts that is not that of
                the classes, an unknown column, a value that cannot be coded, an image file that
                does not exist, or an attribute named like another column of the predictions.
        """
        if len(prompts) < 2:
            raise ValueError(f"expected a prompt for each of two or more classes, got {prompts}")
        if len(set(prompts)) != len(prompts):
            raise ValueError(f"expected another prompt for each class, got {list(prompts)}")
        labels, classes = encode_labels(table, label, len(prompts))
        groups, book = encode_attributes(table, attributes, codebook, others_unknown=others_unknown)
        files, remarks = check_images(table, image_key), group_remarks(table, groups, book)
        task = cls(files, labels, classes, tuple(prompts), groups, book, remarks)
        if twice := [name for name, count in Counter(task.header()).items() if count > 1]:
            raise ValueError(f"attributes named {twice}: taken by other columns of the predictions")
        return task

    def header(self) -> list[str]:
        """Return the column names of the predictions."""
        probabilities = [f"prob_{name}" for name in self.classes]
        return ["id", "file", "label", "prediction", *probabilities, *self.codebook.labels]


@dataclass(frozen=True)
class Predictions:
    """The class probabilities (N, K) that a model gave the images of a task, float64."""

    task: ZeroShotTask
    probabilities: FloatArray
    predicted: IntArray

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row per image, in the order of the table, whole or not at all.

        Columns: id (the row number from 0), file, label, prediction, prob_CLASS for each class,
        and each attribute. Classes and groups are written by name, an unknown group as nothing.
        """
        task = self.task
        names = [(*labels, "") for labels in task.codebook.labels.values()]
        rows = [
            [
                *(row, file, task.classes[task.labels[row]], task.classes[self.predicted[row]]),
                *(f"{probability:.9g}" for probability in self.probabilities[row]),
                *(name[code] for name, code in zip(names, task.groups[row], strict=True)),
            ]
            for row, file in enumerate(task.files)
        ]
        write_table(path, task.header(), rows)


def zero_shot_probabilities(
    model: nn.Module,
    images: Iterable[Tensor],
    texts: Tensor,
    device: torch.device | str,
    *,
    input_dtype: torch.dtype = torch.float32,
) -> FloatArray:
    """Class probabilities of images: p_i = softmax_k(tau v_i . t_k), float64 (N, K).

    tau is the model's logit scale, v_i and t_k are the L2-normalised features of image i and of
    class k's prompt; `images` are batches (B, 3, H, W), `texts` the prompts' tokens (K, L). A logit
    bias (SigLIP) is the same for every class and cancels. The products are taken in float64, so
    that a large tau ties fewer scores. The model is put in evaluation mode for the call, and left
    in the mode it had; under `torch.autocast` it computes as autocast says.

    Raises:
        ValueError: no images, or features that are not finite.
    """
    encoder: Any = model
    modes = [(module, module.training) for module in model.modules()]
    model.eval()

    def unit(features: Tensor) -> Tensor:
        return F.normalize(features.float(), dim=-1).cpu().double()

    try:
        with torch.no_grad():
            scale = encoder.logit_scale.cpu().double().exp()
            text = scale * unit(encoder.encode_text(texts.to(device)))
            logits = [
                unit(encoder.encode_image(batch.to(device=device, dtype=input_dtype))) @ text.T
                for batch in images
            ]
    finally:
        for module, mode in modes:
            module.training = mode
    if not logits:
        raise ValueError("expected images, got none")
    probabilities: FloatArray = torch.cat(logits).softmax(dim=-1).numpy()
    if len(bad := np.flatnonzero(~np.isfinite(probabilities).all(axis=1))):
        raise ValueError(f"the model's output for row {bad[0] + 1} is not finite")
    return probabilities


def evaluate_task(
    model: nn.Module,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    task: ZeroShotTask,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    workers: int = 0,
    input_dtype: torch.dtype = torch.float32,
    threshold: float = 0.5,
    **report_options: Any,
) -> tuple[FairnessReport, Predictions]:
    """Classify the images of a task and report how fairly.

    `model` is an open_clip model on `device` that takes images as `input_dtype`, `preprocess` its
    transform for inference, image -> tensor (3, H, W), and `tokenizer` its own. `batch_size` images
    are classified at a time; `workers` processes read them, with 0 this one. The other options are
    those of `fairness_report`.

    A UserWarning says where the AUC is so far below 0.5 that prompts and classes may be crossed,
    and of the first image of more than 8 bits, of which the transform keeps 0 to 255.

    Raises:
        ValueError: an image that cannot be read, output that is not finite, or a bad setting.
    """
    check_integer("batch_size", batch_size, 1)
    check_integer("workers", workers, 0)
    check_settings(threshold, **report_options)
    rows: Any = list(enumerate(task.files, start=1))
    read = partial(_read_images, preprocess)
    own = torch.Generator()  # without it the loader would draw from, and so shift, the global one
    loader = DataLoader(rows, batch_size, num_workers=workers, collate_fn=read, generator=own)
    deep: list[str] = []

    def images() -> Iterator[Tensor]:
        for batch, found in loader:
            deep.extend(found)
            yield batch

    texts = tokenizer(list(task.prompts))
    probabilities = zero_shot_probabilities(model, images(), texts, device, input_dtype=input_dtype)
    if deep:
        warnings.warn(deep_warning(deep[0]), UserWarning, stacklevel=2)
    groups = dict(zip(task.codebook.labels, task.groups.T, strict=True))
    options = {"labels": task.codebook, "threshold": threshold, **report_options}
    report = fairness_report(task.labels, probabilities, groups, **options)
    if report.auc.value < CROSSED_AUC:
        pairs = zip(task.prompts, task.classes, strict=True)
        shown = ", ".join(f"{prompt!r} for class {name!r}" for prompt, name in pairs)
        low = f"the AUC of {report.auc.value:.3f} is far below 0.5"
        what = f"{low}: prompts and classes may be crossed ({shown})"
        warnings.warn(what, UserWarning, stacklevel=2)
    return report, Predictions(task, probabilities, decide(probabilities, threshold))


def _read_images(
    preprocess: Preprocess, rows: Sequence[tuple[int, str]]
) -> tuple[Tensor, list[str]]:
    """Read image files, each with its row; say which are deep. A ValueError names what is none."""
    images, deep = [], []
    for row, file in rows:
        try:
            with Image.open(file) as image:
                image.load()
        # Pillow's decoders raise more than OSError for broken files (SyntaxError, struct.error).
        except Exception as error:
            where = f"row {row}: cannot read image {file!r}"
            raise ValueError(f"{where}: {reason(error)}") from error
        if is_deep(image):
            deep.append(f"row {row}: image {file!r}")
        images.append(preprocess(image))
    return torch.stack(images), deep
