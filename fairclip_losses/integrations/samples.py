"""A pair and what travels beside it, in either of the forms that hosts have: tuple or dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "fair_"
"""How the names begin under which things travel beside the pair in a dict."""


def with_beside(sample: Any, **beside: Any) -> Any:
    """Return a sample with things beside it: at the end of a tuple, by their names in a dict.

    Names begin with `PREFIX`.
    """
    if isinstance(sample, Mapping):
        return {**sample, **beside}
    return (*sample, *beside.values())


def as_tuple(batch: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the entries ``keys`` of a batch, in their order, and what travels beside them."""
    beside = (value for name, value in batch.items() if name.startswith(PREFIX))
    return (*(batch[key] for key in keys), *beside)


def as_dict(values: Any, keys: tuple[str, ...], original: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``original`` batch with the values in place of its own, and nothing beside them.

    Raises:
        ValueError: not one value for each of ``keys``.
    """
    if not isinstance(values, (tuple, list)):
        got = type(values).__name__
    elif len(values) != len(keys):
        got = f"{len(values)} values"
    else:
        rest = {name: value for name, value in original.items() if not name.startswith(PREFIX)}
        return rest | dict(zip(keys, values, strict=True))
    raise ValueError(f"state.batch must be ({', '.join(keys)}) when the host gets it, got {got}")
