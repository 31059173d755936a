"""The ids and groups of one process's pairs: checked, then gathered with those of the others."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed import Processes
from ..functional import stack_groups


@dataclass(frozen=True)
class LocalMetadata:
    """What came beside the model's output in this process, or why it is refused."""

    device: torch.device
    refusal: str | None
    layout: tuple[int, ...]  # what must be the same in every process
    columns: Tensor  # (b, 0 or 1 + C) int64: the ids where there are any, the groups
    has_ids: bool
    names: tuple[str, ...] | None  # of the attributes, where the groups came by name

    @classmethod
    def of(
        cls,
        model_out: Mapping[str, Any],
        pair_ids: Tensor | None,
        groups: Tensor | Mapping[str, Tensor] | None,
        recording: bool,
        refusal: str | None,
        check: Callable[[Tensor, Tensor], None] | None,
    ) -> LocalMetadata:
        """Check them without an exchange; ``check`` is the miner's own, ``refusal`` what it has."""
        features, texts = (model_out.get(f"{side}_features") for side in ("image", "text"))
        device = features.device if isinstance(features, Tensor) else torch.device("cpu")
        count, columns = 0, []
        names = tuple(groups) if isinstance(groups, Mapping) else None
        try:
            if refusal is not None:
                raise ValueError(refusal)
            if not isinstance(features, Tensor):
                raise ValueError(
                    "several processes need image_features in the model's output, "
                    f"got {sorted(model_out)}"
                )
            if isinstance(texts, Tensor) and features.shape != texts.shape:
                raise ValueError(
                    "image_features and text_features must have one shape, "
                    f"got {tuple(features.shape)} and {tuple(texts.shape)}"
                )
            count = len(features)
            if pair_ids is not None:
                if check is not None:
                    check(torch.zeros(count), pair_ids)
                columns.append(_column("pair_ids", pair_ids, count))
            if groups is not None:
                columns.extend(_column("groups", stack_groups(groups), count).unbind(1))
        except ValueError as error:
            refusal = str(error)
        return cls(
            device,
            refusal,
            (count, recording, pair_ids is not None, len(columns), _fingerprint(names)),
            torch.stack([column.to(device) for column in columns], 1)
            if columns and refusal is None
            else torch.empty(count, 0, dtype=torch.int64, device=device),
            pair_ids is not None,
            names,
        )

    def gather(
        self, processes: Processes
    ) -> tuple[Tensor | None, Tensor | dict[str, Tensor] | None]:
        """Return the ids and groups of all processes, in one exchange."""
        if not self.columns.shape[1]:
            return None, None
        everything = processes.gather(self.columns)
        ids = everything[:, 0] if self.has_ids else None
        groups = everything[:, 1:] if self.has_ids else everything
        if self.names is not None:
            return ids, dict(zip(self.names, groups.unbind(1), strict=True))
        return ids, groups if groups.shape[1] else None


def _column(name: str, values: Tensor, count: int) -> Tensor:
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(values).__name__}")
    if values.shape[:1] != (count,):
        raise ValueError(
            f"{name} must have one row for each of the {count} pairs of this process, "
            f"got shape {tuple(values.shape)}"
        )
    return values.to(torch.int64)


def _fingerprint(names: tuple[str, ...] | None) -> int:
    return -1 if names is None else zlib.crc32("\0".join(names).encode())
