"""Scalars to wherever the host logs its own."""

from __future__ import annotations

from collections.abc import Mapping

from .events import TrainState


def log_scalars(
    state: TrainState, scalars: Mapping[str, float], step: int, *, wandb_step: int | None = None
) -> None:
    """Write scalars to TensorBoard and W&B where the run reports to them.

    ``wandb_step`` is W&B's step where it counts otherwise than TensorBoard.
    """
    if state.tb_writer is not None:
        for name, value in scalars.items():
            state.tb_writer.add_scalar(name, value, step)
    if getattr(state.args, "wandb", False):
        import wandb

        wandb.log(dict(scalars), step=step if wandb_step is None else wandb_step)
