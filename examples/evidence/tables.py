"""Tables of the study: paired differences to plain training, with bootstrap intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

# Column of the results, name in the table, whether the difference is relative, in per cent.
MEASURES = (
    ("es_auc", "ES-AUC", True),
    ("es_accuracy", "ES-accuracy", False),
    ("auc", "AUC", False),
    ("deodds", "DEOdds", False),
)


def read_frame(path: Path) -> pd.DataFrame:
    """Return the trainings, one row each; the last line of a repeated training counts."""
    frame = pd.read_json(path, lines=True)
    return frame.drop_duplicates(["condition", "method", "seed", "epochs"], keep="last")


def differences(frame: pd.DataFrame, measure: str, relative: bool, against: str) -> pd.DataFrame:
    """Return each training's difference to `against` of the same condition, seed and epochs."""
    pair = ["condition", "seed", "epochs"]
    base = frame[frame.method == against].set_index(pair)[measure].rename("base")
    both = frame[frame.method != against].join(base, on=pair, how="inner")
    both["difference"] = both[measure] - both.base
    if relative:
        both["difference"] *= 100 / both.base
    return both


def interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval (BCa) of the mean over seeds."""
    if len(values) < 3 or np.ptp(values) == 0:
        return float("nan"), float("nan")
    found = bootstrap((values,), np.mean, random_state=0).confidence_interval
    return float(found.low), float(found.high)


def _cell(values: pd.Series[float], relative: bool) -> str:
    low, high = interval(values.to_numpy())
    unit, digits = (" %", 1) if relative else ("", 3)
    spread = "" if np.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{values.mean():+.{digits}f}{unit}{spread}"


def condition_table(frame: pd.DataFrame, condition: str, against: str = "plain") -> str:
    """Return a Markdown table of one condition: every method against `against`, by seed pairs."""
    own = frame[frame.condition == condition]
    by_measure = {
        name: differences(own, column, relative, against).groupby("method").difference
        for column, name, relative in MEASURES
    }
    base = own[own.method == against]
    rows = {}
    for method in dict.fromkeys(own.method):
        if method == against:
            continue
        cells = {
            name: _cell(groups.get_group(method), relative)
            for (_, name, relative), groups in zip(MEASURES, by_measure.values(), strict=True)
            if method in groups.groups
        }
        if not cells:
            continue
        relative = by_measure["ES-AUC"].get_group(method)
        chosen = own[own.method == method]
        rows[method] = {
            "seeds": len(relative),
            **cells,
            "smallest": f"{relative.min():+.1f} %",
            "bad pairs, AUROC all / minority": _pair(chosen, "bad_auroc", "minority_bad_auroc"),
            "right flagged, majority / minority": _pair(
                chosen, "majority_right_flagged", "minority_right_flagged"
            ),
            "time": f"{chosen.seconds.median() / base.seconds.median():.2f}x",
        }
    figures = ", ".join(f"{name} {base[column].mean():.3f}" for column, name, _ in MEASURES)
    table = pd.DataFrame.from_dict(rows, orient="index").fillna("")
    lines = ["| method | " + " | ".join(table.columns) + " |", "|---" * (table.shape[1] + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in table.iterrows()]
    return f"### {condition}\n\n{against}: {figures} ({len(base)} seeds)\n\n" + "\n".join(lines)


def _pair(chosen: pd.DataFrame, first: str, second: str) -> str:
    if first not in chosen or chosen[first].isna().all():
        return ""
    return f"{chosen[first].mean():.3f} / {chosen[second].mean():.3f}"


def write_tables(path: Path) -> Path:
    """Write the tables of a results file beside it, and return their path."""
    frame = read_frame(path)
    parts = [condition_table(frame, condition) for condition in dict.fromkeys(frame.condition)]
    tables = path.with_suffix(".md")
    tables.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return tables
