"""How many kernels does the fairness term launch on a GPU, whose host takes microseconds for each?

    python examples/benchmarks/launches.py

No GPU is needed: the term is run on tensors without values that say that they lie on a CUDA device.
So the count is of torch's operators that write something; an operator may be several kernels (a
sort is), and what a GPU takes for them is another question. `torch.compile` and CUDA graphs launch
fewer, or all at once. Forward, with a gradient in the scores; backward, which only scales what
forward found, adds some ten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from method import conditions, save
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fairclip_losses.functional import sinkhorn_fairness

CASES = ((1, 0.0), (2, 0.0), (1, 0.05), (2, 0.05))
SIZES = ((3, 32), (3, 256), (8, 512), (8, 1024))
# What writes nothing: views, memory not yet written, questions about tensors.
_NO_KERNEL = frozenset(
    [
        "alias",
        "as_strided",
        "detach",
        "device",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "lift_fresh",
        "new_empty",
        "permute",
        "promote_types",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
        "_reshape_alias",
        "_unsafe_view",
    ]
)


class Launches(TorchDispatchMode):
    """Counts operators that write something, inside ``with``."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        self.count += func.overloadpacket.__name__ not in _NO_KERNEL
        return func(*args, **(kwargs or {}))


def launches(p: int, blur: float, groups: int, n: int) -> int:
    """Return those of the forward pass of the fairness term for ``n`` scores."""
    with FakeTensorMode():
        scores = torch.empty(n, device="cuda", requires_grad=True)
        codes = torch.empty(n, device="cuda", dtype=torch.int64)
        with Launches() as counted:
            sinkhorn_fairness(scores, codes, (groups,), p=p, blur=blur)
    return counted.count


def main() -> None:
    rows: list[dict[str, object]] = []
    print("| (G, N) | " + " | ".join(f"p = {p}, blur {blur}" for p, blur in CASES) + " |")
    for groups, n in SIZES:
        counts = [launches(p, blur, groups, n) for p, blur in CASES]
        rows += [
            {"groups": groups, "n": n, "p": p, "blur": blur, "launches": count}
            for (p, blur), count in zip(CASES, counts, strict=True)
        ]
        print(f"| ({groups}, {n:,}) | " + " | ".join(f"{count:,}" for count in counts) + " |")
    question = "operators that the fairness term launches on a CUDA device, forward"
    print(save("launches", question, rows, conditions()))


if __name__ == "__main__":
    main()
