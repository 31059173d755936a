"""Zero-shot classification of a table of images by a CLIP model, and the fairness report of it.

    Table -> ZeroShotTask -> evaluate_task(model, ...) -> FairnessReport, Predictions

A task is checked when it is made, so that a wrong column or a missing image stops a training before
it starts; it can then be evaluated after every epoch. Evaluating draws no random numbers from the
global generators and leaves the model as it was, so that it does not change a training.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fairclip_losses._weighted import FloatArray, IntArray, decide
from fairclip_losses.data import (
    CodeBook,
    Table,
    encode_attributes,
    encode_labels,
    write_table,
)
from fairclip_losses.report import FairnessReport, fairness_report

__all__ = [
    "Predictions",
    "ZeroShotTask",
    "class_text_features",
    "evaluate_task",
    "evaluate_zero_shot",
    "zero_shot_probabilities",
]

Preprocess = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class ZeroShotTask:
    """What to classify: N images, the class of each, one prompt per class, and the groups.

    Made by `from_table`, which checks everything that can be checked without a model.
    """

    files: list[str]
    labels: IntArray
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    groups: IntArray
    codebook: CodeBook

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

        Args:
            table: the N rows.
            label: column of the true class, coded as by `encode_labels`: prompt k is class k.
            prompts: one text per class.
            attributes: columns of the protected attributes, coded as by `encode_attributes`.
            codebook: labels of the groups decided earlier; None: this table decides.
            others_unknown: attributes of which a value that the code book lacks is unknown.
            image_key: column of the image files, relative to the working directory.

        Raises:
            ValueError: fewer than two prompts, one twice, a number of prompts that is not that of
                the classes, an unknown column, a value that cannot be coded, an image file that
                does not exist, or an attribute named like another column of the predictions.
        """
        if len(prompts) < 2:
            raise ValueError(f"expected a prompt for each of two or more classes, got {prompts}")
        if len(set(prompts)) != len(prompts):
            raise ValueError(f"expected another prompt for each class, got {list(prompts)}")
        files = table.column(image_key)
        labels, classes = encode_labels(table, label, len(prompts))
        groups, book = encode_attributes(table, attributes, codebook, others_unknown=others_unknown)
        for row, file in enumerate(files, start=1):
            if not os.path.isfile(file):
                raise ValueError(f"{table.path}: row {row}: no image file {file!r}")
        task = cls(files, labels, classes, tuple(prompts), groups, book)
        twice = [name for name, count in Counter(task.header()).items() if count > 1]
        if twice:
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
                row,
                file,
                task.classes[task.labels[row]],
                task.classes[self.predicted[row]],
                *(f"{probability:.9g}" for probability in self.probabilities[row]),
                *(name[code] for name, code in zip(names, task.groups[row], strict=True)),
            ]
            for row, file in enumerate(task.files)
        ]
        write_table(path, task.header(), rows)


def class_text_features(
    model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[str], device: torch.device | str
) -> Tensor:
    """Encode one prompt per class: L2-normalised text features (K, D), float32, on `device`.

    The model is put in evaluation mode for the call, and left in the mode it had.
    """
    encoder: Any = model
    with _evaluating(model):
        features: Tensor = encoder.encode_text(tokenizer(list(prompts)).to(device))
        return F.normalize(features.float(), dim=-1)


def zero_shot_probabilities(
    model: nn.Module,
    images: Iterable[Tensor],
    text_features: Tensor,
    device: torch.device | str,
    *,
    input_dtype: torch.dtype = torch.float32,
) -> FloatArray:
    """Class probabilities of images: p_i = softmax_k(tau v_i . t_k).

    tau is the model's logit scale, v_i the L2-normalised image feature. A logit bias (SigLIP) is
    the same for every class and cancels. The products are taken in float64, so that a large tau
    ties fewer scores. The model is put in evaluation mode for the call, and left in the mode it
    had; under `torch.autocast` it computes as autocast says.

    Args:
        model: an open_clip model (`encode_image`, `logit_scale`).
        images: batches (B, 3, H, W), such as a DataLoader gives.
        text_features: L2-normalised (K, D), from `class_text_features`.
        device: where the model is.
        input_dtype: what the model takes images in.

    Returns:
        float64 (N, K), rows adding up to 1.

    Raises:
        ValueError: no images, or features that are not finite.
    """
    encoder: Any = model
    text = text_features.detach().cpu().double()
    logits = []
    with _evaluating(model):
        scale = encoder.logit_scale.detach().cpu().double().exp()
        for batch in images:
            features: Tensor = encoder.encode_image(batch.to(device=device, dtype=input_dtype))
            features = F.normalize(features.float(), dim=-1)
            logits.append(scale * features.cpu().double() @ text.T)
    if not logits:
        raise ValueError("expected images, got none")
    probabilities: FloatArray = torch.cat(logits).softmax(dim=-1).numpy()
    if not np.isfinite(probabilities).all():
        row = int(np.flatnonzero(~np.isfinite(probabilities).all(axis=1))[0]) + 1
        raise ValueError(f"the model's output for row {row} is not finite")
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
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[FairnessReport, Predictions]:
    """Classify the images of a task and report how fairly.

    Args:
        model: an open_clip model, on `device`.
        preprocess: image -> tensor (3, H, W), the model's own for inference.
        tokenizer: texts -> token ids, the model's own.
        task: the images, classes, prompts and groups.
        batch_size: images per forward pass.
        device: where the model is.
        workers: processes that read images; 0: this one.
        input_dtype: what the model takes images in.
        threshold: as `n_bootstrap`, `confidence` and `seed`, for `fairness_report`.
        n_bootstrap: number of resamples.
        confidence: coverage of the intervals.
        seed: of the resampling.

    Raises:
        ValueError: an image that cannot be read, output that is not finite, or a setting out of
            range.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"expected batch_size >= 1 and workers >= 0, got {batch_size}, {workers}")
    loader = DataLoader(
        _Images(task.files, preprocess),
        batch_size=batch_size,
        num_workers=workers,
        # Without its own generator the loader would draw from, and so shift, the global one.
        generator=torch.Generator(),
    )
    text_features = class_text_features(model, tokenizer, task.prompts, device)
    probabilities = zero_shot_probabilities(
        model, loader, text_features, device, input_dtype=input_dtype
    )
    report = fairness_report(
        task.labels,
        probabilities,
        dict(zip(task.codebook.labels, task.groups.T, strict=True)),
        labels=task.codebook,
        threshold=threshold,
        n_bootstrap=n_bootstrap,
        confidence=confidence,
        seed=seed,
    )
    return report, Predictions(task, probabilities, decide(probabilities, threshold))


def evaluate_zero_shot(
    model: nn.Module,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    table: Table,
    *,
    label: str,
    prompts: Sequence[str],
    attributes: Sequence[str],
    codebook: CodeBook | None = None,
    others_unknown: Collection[str] = (),
    image_key: str = "filepath",
    **options: Any,
) -> tuple[FairnessReport, Predictions]:
    """Make a task of a table and evaluate it: `ZeroShotTask.from_table`, then `evaluate_task`.

    `options` are those of `evaluate_task`: batch_size, device, workers and so on.
    """
    task = ZeroShotTask.from_table(
        table,
        label=label,
        prompts=prompts,
        attributes=attributes,
        codebook=codebook,
        others_unknown=others_unknown,
        image_key=image_key,
    )
    return evaluate_task(model, preprocess, tokenizer, task, **options)


class _Images(Dataset[Tensor]):
    """Image files as tensors; a file that is no image is a ValueError that names it."""

    def __init__(self, files: Sequence[str], preprocess: Preprocess) -> None:
        self.files = files
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        file = self.files[index]
        try:
            with Image.open(file) as image:
                image.load()
        # Pillow's decoders raise more than OSError for broken files (SyntaxError, struct.error).
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"row {index + 1}: cannot read image {file!r}: {reason}") from error
        return self.preprocess(image)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Turn evaluation mode on and gradients off; give every submodule its own mode back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
