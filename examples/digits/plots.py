"""The report's figures, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from results import METRICS, RUNS, Comparison, SeedResult, macro_roc, mining

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLOURS = {"plain": "#777777", "fair": "#0b6fa4", "good": "#3a7d44", "bad": "#b3321b"}
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "digits",
}


def roc_curves(results: Sequence[SeedResult], groups: Sequence[str]) -> str:
    """Draw each group's macro-averaged ROC curve: mean over the seeds, range as a band."""
    grid = np.linspace(0, 1, 201)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, len(groups), figsize=(7.6, 3.5), sharey=True)
        for axis, group in zip(axes, groups, strict=True):
            for name in RUNS:
                curves = []
                for result in results:
                    seen = result.runs[name].predictions
                    members = seen.groups["group"] == group
                    curves.append(macro_roc(seen.digit[members], seen.probabilities[members], grid))
                axis.fill_between(
                    grid,
                    np.min(curves, 0),
                    np.max(curves, 0),
                    color=COLOURS[name],
                    alpha=0.18,
                    lw=0,
                )
                axis.plot(grid, np.mean(curves, 0), color=COLOURS[name], label=name)
            axis.plot([0, 1], [0, 1], color="#bbbbbb", lw=0.8, ls=":")
            axis.set(title=group, xlabel="false positive rate", aspect="equal")
        axes[0].set_ylabel("true positive rate")
        axes[0].legend(loc="lower right")
        return _svg(figure)


def metric_dots(results: Sequence[SeedResult]) -> str:
    """Draw each metric's value in every seed with its bootstrap interval, plain beside fair."""
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(2, 4, figsize=(7.6, 4.2))
        axes = list(grid.flat)
        for axis, metric in zip(axes, METRICS, strict=False):
            for shift, name in ((-0.13, "plain"), (0.13, "fair")):
                intervals = [result.runs[name].fairness[metric.key] for result in results]
                values = np.array([interval.value for interval in intervals])
                low = values - [interval.low for interval in intervals]
                high = [interval.high for interval in intervals] - values
                axis.errorbar(
                    np.arange(len(results)) + shift,
                    values,
                    yerr=np.clip([low, high], 0, None),
                    fmt="o",
                    ms=4,
                    lw=1.2,
                    color=COLOURS[name],
                    label=name,
                )
            axis.set_title(metric.title + ("" if metric.higher_is_better else " (low is fair)"))
            axis.set_xticks(range(len(results)), [str(result.seed) for result in results])
            axis.set_xlim(-0.5, len(results) - 0.5)
        for axis in axes[len(METRICS) :]:
            axis.axis("off")
        handles, labels = axes[0].get_legend_handles_labels()
        axes[-1].legend(handles, labels, loc="center left", title="seed on the x axis")
        return _svg(figure)


def loss_history(results: Sequence[SeedResult]) -> str:
    """Draw mean and quartiles of the miner's mean loss, wrong captions against right ones."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(7.6, 3.0))
        numbers = sorted(set.intersection(*(set(result.epochs) for result in results)))
        for wrong, label, colour in (
            (False, "right caption", COLOURS["good"]),
            (True, "wrong caption", COLOURS["bad"]),
        ):
            lines = []
            for number in numbers:
                losses = np.concatenate(
                    [r.epochs[number].mean_loss[r.epochs[number].wrong == wrong] for r in results]
                )
                lines.append([losses.mean(), *np.quantile(losses, [0.25, 0.75])])
            mean, low, high = np.array(lines).T
            axes[0].fill_between(numbers, low, high, color=colour, alpha=0.2, lw=0)
            axes[0].plot(numbers, mean, color=colour, label=label)
        axes[0].set(title="mean loss so far of a pair", xlabel="epoch")
        axes[0].legend(loc="best", fontsize=8.5)

        found = [[mining(result.epochs[number]) for number in numbers] for result in results]
        for name, colour in (("auroc", "#333333"), ("precision", "#0b6fa4"), ("recall", "#c98a00")):
            values = [[getattr(m, name) for m in row] for row in found]
            axes[1].plot(numbers, np.mean(values, 0), color=colour, label=name, lw=1.4)
        axes[1].set(title="finding the wrong captions", xlabel="epoch", ylim=(0, 1.02))
        axes[1].legend(loc="best", fontsize=8.5)

        for group, colour in zip(found[0][0].flag_rate, ("#333333", "#b3321b"), strict=False):
            rates = [[m.flag_rate[group] for m in row] for row in found]
            axes[2].plot(
                numbers, np.mean(rates, 0), color=colour, label=f"{group}, flagged", lw=1.4
            )
            false = [[m.false_flag_rate[group] for m in row] for row in found]
            label = f"{group}, right but flagged"
            axes[2].plot(numbers, np.mean(false, 0), color=colour, label=label, ls="--", lw=1.4)
        axes[2].set(title="flag rate by group", xlabel="epoch")
        # Room for the legend above the curves.
        axes[2].set_ylim(0, 1.6 * axes[2].get_ylim()[1])
        axes[2].legend(loc="upper right", fontsize=7.5)
        return _svg(figure)


def differences(comparisons: Sequence[Comparison]) -> str:
    """Draw the mean paired difference fair - plain of each metric with its interval."""
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(7.6, 2.6))
        for row, comparison in enumerate(reversed(comparisons)):
            gain = comparison.gain
            axis.plot([gain.low, gain.high], [row, row], color=COLOURS["fair"], lw=1.6)
            axis.plot(gain.value, row, "o", color=COLOURS["fair"], ms=5)
            sign = 1 if comparison.metric.higher_is_better else -1
            dots = sign * (comparison.values["fair"] - comparison.values["plain"])
            axis.plot(dots, np.full(len(dots), row), "|", color="#333333", ms=9)
        axis.axvline(0, color="#999999", lw=0.8)
        titles = [
            c.metric.title + ("" if c.metric.higher_is_better else ", turned")
            for c in reversed(comparisons)
        ]
        axis.set_yticks(range(len(comparisons)), titles)
        axis.set_xlabel("difference in favour of fair: mean, 95 % interval, | single seeds")
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()
