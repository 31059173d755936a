"""The loss that `FairLoss` wraps: how it is called, and how what it returns is changed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..pair_terms import PairTerms


@dataclass(frozen=True)
class CallForm:
    """How a base loss takes its arguments."""

    positional: tuple[str, ...]
    takes_output_dict: bool

    @classmethod
    def of(cls, loss: nn.Module) -> CallForm:
        """Read it off the signature of the loss."""
        parameters = inspect.signature(loss.forward).parameters.values()
        return cls(
            tuple(p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD),
            any(p.name == "output_dict" or p.kind is inspect.Parameter.VAR_KEYWORD
                for p in parameters),
        )  # fmt: skip

    def by_name(self, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """Return all that was passed by the names of the parameters.

        Raises:
            ValueError: too many by position, or one by position and by name.
        """
        names = self.positional
        if len(args) > len(names):
            raise ValueError(
                f"expected at most {len(names)} positional arguments ({', '.join(names)}), "
                f"got {len(args)}"
            )
        twice = [name for name in names[: len(args)] if name in named]
        if twice:
            raise ValueError(f"expected {', '.join(twice)} once, got it by position and by name")
        return {**dict(zip(names[: len(args)], args, strict=True)), **named}

    def call(self, loss: nn.Module, model_out: dict[str, Any], output_dict: bool) -> Any:
        """Call the loss.

        Raises:
            ValueError: the dict form of a loss that has none.
        """
        if self.takes_output_dict:
            return loss(**model_out, output_dict=output_dict)
        if output_dict:
            raise ValueError(
                f"output_dict=True needs a base loss that takes it, got {type(loss).__name__}"
            )
        return loss(**model_out)


def check_fit(base: Any, terms: PairTerms, several_processes: bool) -> None:
    """Refuse per-pair terms that do not fit what the base loss returned, or each other.

    Raises:
        ValueError: names that are not in it, or terms that are not (B,).
    """
    names = list(terms.named)
    if isinstance(base, dict):
        if not terms.named.keys() <= base.keys():
            raise ValueError(f"pair_terms names {names}, but the base loss returned {list(base)}")
    elif len(names) > (count := len(base) if isinstance(base, tuple) else 1):
        raise ValueError(f"pair_terms names {names}, but the base loss returned {count} terms")
    count = terms.contrastive.numel()
    for name, values in (("contrastive", terms.contrastive), *terms.named.items()):
        # Over several processes some terms are of this one's pairs and some of all.
        if values.dim() != 1 or (values.shape[0] != count and not several_processes):
            raise ValueError(
                f"the terms of pair_terms must all have shape (B,), B = {count}, "
                f"got {name} of shape {tuple(values.shape)}"
            )


def changed(base: Any, changes: Mapping[str, Tensor], fairness: Tensor | None) -> Any:
    """Return what the base loss returned, in its own form, with changes by name and the term.

    `check_fit` has made sure that they fit: by now the batch is recorded.
    """
    if isinstance(base, dict):
        combined = {
            name: value + changes[name] if name in changes else value
            for name, value in base.items()
        }
        return combined if fairness is None else {**combined, "fairness_loss": fairness}
    # Positional forms list the terms in the order of `PairTerms.named`.
    parts = list(base) if isinstance(base, tuple) else [base]
    for k, change in enumerate(changes.values()):
        parts[k] = parts[k] + change
    if fairness is not None:
        parts[0] = parts[0] + fairness
    return tuple(parts) if isinstance(base, tuple) else parts[0]
