"""What the numbers say, in sentences computed from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from results import Comparison, Mining, SeedResult, mining


def verdict(comparison: Comparison) -> str:
    """Say in one clause whether the fair run is better in a metric.

    Clear needs both: an interval of the paired difference without 0, and the same sign in every
    seed. Everything else is called what it is.
    """
    gain, seeds = comparison.gain, len(comparison.values["fair"])
    worse = int((comparison.values["fair"] != comparison.values["plain"]).sum()) - comparison.better
    if gain.value == 0 and gain.low == gain.high == 0:
        return "no difference"
    if gain.low > 0 and comparison.better == seeds:
        return "fair is better"
    if gain.high < 0 and worse == seeds:
        return "plain is better"
    leaning = "fair" if gain.value > 0 else "plain"
    if gain.excludes_zero:
        return f"{leaning} leads on average, not in every seed"
    return f"no difference shown ({leaning} ahead, but 0 is in the interval)"


def sentences(comparisons: Sequence[Comparison], results: Sequence[SeedResult]) -> list[str]:
    """Read the comparison and the miner's findings for someone who has not seen the tables."""
    by_title = {comparison.metric.title: comparison for comparison in comparisons}
    out = []
    for title, what in (
        ("ES-AUC", "Fairness (equity-scaled AUC between the groups)"),
        ("AUC", "Overall quality (AUC)"),
        ("AUC, minority", "The minority's AUC"),
        ("AUC, majority", "The majority's AUC"),
    ):
        comparison = by_title[title]
        plain, fair = (comparison.values[name].mean() for name in ("plain", "fair"))
        d = comparison.difference
        out.append(
            f"{what}: plain {plain:.3f}, fair {fair:.3f}, difference {d.value:+.3f} "
            f"[{d.low:+.3f}, {d.high:+.3f}], better in {comparison.better} of "
            f"{len(results)} seeds: {verdict(comparison)}."
        )
    out.append(_gaps([by_title["DPD"], by_title["DEOdds"]]))
    out.append(_overlaps(by_title["ES-AUC"], results))
    control = by_title["ES-AUC, site (control)"]
    out.append(
        f"Control: nothing was planted on the attribute site; its ES-AUC moves by "
        f"{control.difference.value:+.3f}: {verdict(control)}."
    )
    out.append(mined([mining(result.last) for result in results]))
    if len(results) < 3:
        out.append(
            f"{len(results)} seed{'s' if len(results) > 1 else ''} only: "
            f"too little to judge by; the default is four."
        )
    return out


def _gaps(comparisons: Sequence[Comparison]) -> str:
    parts = [
        f"{c.metric.title} {c.values['plain'].mean():.3f} to {c.values['fair'].mean():.3f}, "
        f"{verdict(c)}"
        for c in comparisons
    ]
    return "Gaps in the decisions, where lower is fairer: " + "; ".join(parts) + "."


def _overlaps(comparison: Comparison, results: Sequence[SeedResult]) -> str:
    key = comparison.metric.key
    overlapping = sum(
        result.runs["plain"].fairness[key].overlaps(result.runs["fair"].fairness[key])
        for result in results
    )
    if overlapping == 0:
        return "In no seed do the single intervals of the two ES-AUC values overlap."
    return (
        f"In {overlapping} of {len(results)} seeds the single intervals of the two ES-AUC values "
        f"overlap, so a look at them alone shows no difference; the paired interval above judges "
        f"both runs on the same images."
    )


def mined(found: Sequence[Mining]) -> str:
    """Say how well the wrong captions were found, and what that cost each group."""

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    groups = list(found[0].false_flag_rate)
    costs = {group: mean([m.false_flag_rate[group] for m in found]) for group in groups}
    text = (
        f"Bad pairs: the miner's mean loss ranks wrong captions above right ones with AUROC "
        f"{mean([m.auroc for m in found]):.3f}; of the pairs it flags "
        f"{mean([m.precision for m in found]):.0%} are wrong "
        f"({mean([m.wrong_share for m in found]):.0%} would be by chance), "
        f"and it flags {mean([m.recall for m in found]):.0%} of all wrong ones. Of the pairs that "
        f"are right it flags "
        + ", ".join(f"{cost:.1%} in the {group}" for group, cost in costs.items())
    )
    low, high = min(costs, key=lambda k: costs[k]), max(costs, key=lambda k: costs[k])
    if costs[high] > 1.5 * costs[low]:
        text += f": the {high} pays more for the mining"
    return text + "."
