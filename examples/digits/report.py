"""Write the demo's report: one self-contained HTML file, and the same table for the terminal.

python examples/digits/report.py build/demo     draws it again from finished runs
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plots
from make_data import GROUPS, WORDS, Recipe
from reading import sentences, verdict
from results import METRICS, RUNS, Comparison, Mining, SeedResult, compare, load_seed, mining


def write_report(output: Path, resamples: int = 300) -> str:
    """Compare the finished runs below `output`, write report.html and summary.json there.

    Returns the text for the terminal: the same tables, and the report's path.
    """
    conditions = json.loads((output / "conditions.json").read_text(encoding="utf-8"))
    results = [load_seed(output / f"seed-{seed}") for seed in conditions["seeds"]]
    comparisons = compare(results, resamples)
    found = [mining(result.last) for result in results]
    summary = _summary(conditions, results, comparisons, found)
    (output / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    page = output / "report.html"
    page.write_text(_page(conditions, results, comparisons, found), encoding="utf-8")
    lines = [
        "",
        *_text_table(*_seed_table(results)),
        "",
        *_text_table(*_mean_table(comparisons)),
        "",
        *_text_table(*_mining_table(results, found)),
        "",
        *sentences(comparisons, results),
        "",
        f"report: {page.resolve()}",
    ]
    return "\n".join(lines)


# -- tables: a header and rows of text, shown on the terminal and in the page alike ---------------

Rows = tuple[list[str], list[list[str]]]


def _seed_table(results: Sequence[SeedResult]) -> Rows:
    """Every seed's values with their bootstrap intervals over the images."""
    rows = []
    for metric in METRICS:
        for result in results:
            plain, fair = (result.runs[name].fairness[metric.key] for name in RUNS)
            cells = [f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]" for i in (plain, fair)]
            title = metric.title if result is results[0] else ""
            change = f"{fair.value - plain.value:+.3f}"
            rows.append([title, str(result.seed), *cells, change])
    return ["metric", "seed", "plain [95 %]", "fair [95 %]", "fair - plain"], rows


def _mean_table(comparisons: Sequence[Comparison]) -> Rows:
    """Means and spread over the seeds, and the paired difference."""
    rows = []
    for comparison in comparisons:
        d = comparison.difference
        rows.append(
            [
                comparison.metric.title,
                *(_mean_sd(comparison.values[name]) for name in RUNS),
                f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]",
                f"{comparison.better}/{len(comparison.values['fair'])}",
                verdict(comparison),
            ]
        )
    header = ["metric", "plain", "fair", "fair - plain [95 %]", "fair better in", "reading"]
    return header, rows


def _mining_table(results: Sequence[SeedResult], found: Sequence[Mining]) -> Rows:
    header = ["bad pairs", "AUROC", "precision", "recall", "wrong in all"]
    header += [f"{what}, {group}" for group in GROUPS for what in ("flagged", "right but flagged")]
    rows = []
    for result, m in zip(results, found, strict=True):
        cells = [f"{m.auroc:.3f}", *(f"{v:.1%}" for v in (m.precision, m.recall, m.wrong_share))]
        for group in GROUPS:
            cells += [f"{m.flag_rate[group]:.1%}", f"{m.false_flag_rate[group]:.1%}"]
        rows.append([f"seed {result.seed}", *cells])
    return header, rows


def _mean_sd(values: np.ndarray) -> str:
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


def _text_table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]

    def line(row: list[str]) -> str:
        return "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]


def _summary(
    conditions: dict[str, Any],
    results: Sequence[SeedResult],
    comparisons: Sequence[Comparison],
    found: Sequence[Mining],
) -> dict[str, Any]:
    return {
        "conditions": conditions,
        "metrics": {
            c.metric.title: {
                **{name: [float(v) for v in c.values[name]] for name in RUNS},
                "difference": [c.difference.value, c.difference.low, c.difference.high],
                "fair_better_in": c.better,
                "reading": verdict(c),
            }
            for c in comparisons
        },
        "mining": {str(r.seed): vars(m) for r, m in zip(results, found, strict=True)},
    }


# -- the page ------------------------------------------------------------------------------------

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: 13.5px; margin: .6rem 0; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd;
         vertical-align: top; font-variant-numeric: tabular-nums }
td:not(:last-child) { white-space: nowrap }
th { border-bottom: 1px solid #888; font-weight: 600 }
img.figure { width: 100%; max-width: 56rem; display: block }
.gallery { display: flex; flex-wrap: wrap; gap: .9rem } .gallery figure { margin: 0; width: 7.4rem }
.gallery img { width: 64px; height: 64px; image-rendering: pixelated; display: block }
figcaption { font-size: 12px; line-height: 1.3 } .wrong { color: #b3321b } .right { color: #3a7d44 }
pre { background: #f5f5f3; padding: .7rem; overflow-x: auto; font-size: 12px }
.small { color: #555; font-size: 13px } .scroll { overflow-x: auto }
"""


def _page(
    conditions: dict[str, Any],
    results: Sequence[SeedResult],
    comparisons: Sequence[Comparison],
    found: Sequence[Mining],
) -> str:
    recipe = Recipe()
    first = results[0].runs["plain"].predictions
    sizes = f"{len(results[0].last.ids)} training pairs seen, {len(first.digit)} images evaluated"
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    body = [
        "<h1>Plain CLIP training against the fair loss</h1>",
        _p(
            f"Handwritten digits, {len(results)} seed{'s' if len(results) > 1 else ''} "
            f"({', '.join(str(result.seed) for result in results)}), {conditions['epochs']} "
            f"epochs, the last epoch of both runs evaluated on the {conditions['split']} split; "
            f"{sizes} in each seed. {versions}, Python {conditions['python']}, "
            f"{conditions['seconds']:.0f} s on {conditions['cores']} CPU cores.",
            "small",
        ),
        "<h2>Reading of the result</h2>",
        "<ul>",
        *(f"<li>{html.escape(sentence)}</li>" for sentence in sentences(comparisons, results)),
        "</ul>",
        "<h2>Side by side, over the seeds</h2>",
        _table(*_mean_table(comparisons)),
        _p(
            "Mean ± standard deviation over the seeds. The difference is paired by seed; its "
            "interval is a bootstrap over the images, which both runs and all seeds share. DPD "
            "and DEOdds: lower is fairer; both are one-vs-rest means over the ten digits, and "
            "both are 0 for a model that is equally useless to everyone.",
            "small",
        ),
        _figure(plots.differences(comparisons), "differences between fair and plain"),
        "<h2>Who gains: ROC curves by group</h2>",
        _figure(plots.roc_curves(results, GROUPS), "ROC curves by group"),
        _p(
            "One-vs-rest curves averaged over the ten digits; line: mean over the seeds, band: "
            "their range.",
            "small",
        ),
        "<h2>Every seed, with intervals</h2>",
        _figure(plots.metric_dots(results), "metrics by seed"),
        _table(*_seed_table(results)),
        "<h2>Finding the planted bad pairs</h2>",
        _table(*_mining_table(results, found)),
        _figure(plots.loss_history(results), "loss history of bad and good pairs"),
        _p(
            "Left: mean (line) and quartiles (band) of the pairs' loss histories, all seeds "
            "together. Flagged means found faulty in the last epoch; the truth was used for these "
            "figures only.",
            "small",
        ),
        f"<p>The pairs with the highest loss history in seed {results[0].seed}:</p>",
        _gallery(results[0], range(12)),
        "<h2>What was planted</h2>",
        _p(
            f"scikit-learn's 1,797 handwritten digits, with captions from templates. The group "
            f"“minority” ({recipe.minority_share:.0%} of the images) has less contrast "
            f"(times {recipe.contrast[1][0]} to {recipe.contrast[1][1]}), more noise (standard "
            f"deviation {recipe.noise[1]} instead of {recipe.noise[0]}) and, in training only, "
            f"{recipe.wrong_captions[1]:.0%} wrong captions instead of "
            f"{recipe.wrong_captions[0]:.0%}. The attribute site is drawn at random. Each seed "
            f"draws groups, noise, wrong captions and the split anew. Captions of the validation "
            f"and test splits are right, and no run sees which training captions are wrong."
        ),
        "<h2>Commands</h2>",
        _p(
            f"For seed {results[0].seed}; the others differ in seed and paths. The two trainings "
            f"differ in the --fair options only, and these are the package's defaults."
        ),
        *(f"<pre>{html.escape(command)}</pre>" for command in conditions["commands"]),
        "<h2>Limits</h2>",
        _p(
            "Small images, a tiny model trained from nothing, and a disadvantage that was planted "
            "so that it can be found: this shows that the parts work together and what they do "
            "here, not what they do on clinical data. The intervals cover the choice of test "
            "images; the spread over the seeds covers initialisation, planting and split."
        ),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Digits demo: plain against fair</title><style>{_CSS}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _p(text: str, style: str = "") -> str:
    return f"<p{f' class={style}' if style else ''}>{html.escape(text)}</p>"


def _table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    lines = [line(header, "th"), *(line(row, "td") for row in rows)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _figure(svg: str, alternative: str) -> str:
    return f'<img class="figure" alt="{alternative}" src="{_data_uri(svg.encode(), "svg+xml")}">'


def _gallery(result: SeedResult, ranks: Iterable[int]) -> str:
    """Show pairs by their rank in mean loss, highest first, with the planted truth."""
    pairs = result.last
    order = np.argsort(-pairs.mean_loss, kind="stable")
    figures = []
    for rank in ranks:
        k = int(order[rank])
        image = _data_uri(Path(pairs.files[k]).read_bytes(), "png")
        truth = f"wrong: it is a {WORDS[pairs.digit[k]]}" if pairs.wrong[k] else "right"
        figures.append(
            f'<figure><img alt="" src="{image}"><figcaption>{html.escape(pairs.captions[k])}<br>'
            f'<span class="{"wrong" if pairs.wrong[k] else "right"}">{truth}</span>, '
            f"{pairs.group[k]}, {pairs.kind[k]}, z {pairs.z_score[k]:.1f}</figcaption></figure>"
        )
    return f'<div class="gallery">{"".join(figures)}</div>'


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the demo's report from its finished runs.")
    parser.add_argument("output", nargs="?", default="build/demo", help="the demo's --output")
    try:
        print(write_report(Path(parser.parse_args().output)))
    except (OSError, ValueError, KeyError) as error:
        print(f"digits report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
