"""What the source of shards touches of the host's own reading of webdataset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...errors import UsageError
from .shard_files import missing_files
from .shard_samples import FIELDS, PairStage


def shard_urls(args: Any) -> list[str]:
    """Return the shards as the host spells them out."""
    from open_clip_train.data import expand_urls

    try:
        urls: list[str] = expand_urls(args.train_data)[0]
    except Exception as error:  # whatever braces and environment variables may raise
        raise UsageError(f"--train-data {args.train_data!r}: {error}") from error
    missing = missing_files(urls)
    if missing:
        raise UsageError(
            f"--train-data: no shard file {missing[0]!r}; {len(missing)} of {len(urls)} are missing"
        )
    return urls


def check_host_options(args: Any, shards: int) -> None:
    """Refuse what the host would refuse only after building the model, or wait for forever."""
    from open_clip_train.data import get_dataset_size

    size = args.train_num_samples
    if size is None:
        try:
            size, _ = get_dataset_size(args.train_data)
        except Exception as error:  # a sizes.json that lacks a shard, or is none
            raise UsageError(
                f"--train-data: cannot read the sizes beside its shards ({error!r}); give "
                "--train-num-samples"
            ) from error
        if not size:
            raise UsageError(
                "--train-data: there is no sizes.json or __len__ beside its shards; give "
                "--train-num-samples"
            )
    if size < 1:
        raise UsageError(f"--train-num-samples must be 1 or more, got {size}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if not args.dataset_resampled and shards < max(1, args.workers) * processes:
        raise UsageError(
            f"--workers {args.workers} x {processes} process{'es' * (processes > 1)} need as many "
            f"shards, got {shards}; lower --workers or add --dataset-resampled"
        )


def insert_stage(loader: Any, stage: PairStage) -> None:
    """Let the host's pipeline pass what the stage adds into the batch.

    The pipeline is a list of stages; the one that makes tuples of the samples' images and captions
    takes the stage's fields, too, which the host collates: rows into a tensor, keys into a list.
    Of a batch the two are the third item.
    """
    for source in getattr(loader, "pipeline", ()):
        stages: list[Any] = getattr(getattr(source, "dataset", None), "pipeline", [])
        for position, step in enumerate(stages):
            made_by = getattr(getattr(step, "f", None), "__name__", "")
            if made_by == "_to_tuple" and tuple(step.args) == ("image", "text"):
                wider = type(step)(step.f, *step.args, *FIELDS, **step.kw)
                stages[position : position + 1] = [stage, wider]
                stages.append(_third_item)
                return
    raise UsageError(
        "--fair-loss: the loader of --train-data has no stage to_tuple('image', 'text') in its "
        "pipeline, which is where ids and groups join the batch; open_clip_torch 2.26.1 to 3.3.0 "
        "with webdataset 0.2.5 to 0.2.86 have it"
    )


def _third_item(batches: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Put a batch's rows and keys together: beside its pair a batch carries one thing."""
    for *pair, rows, keys in batches:
        yield (*pair, (rows, keys))
