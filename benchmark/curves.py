"""Learning curves of runs, or of groups of runs, from their metrics.jsonl.

    python benchmark/curves.py runs/my_run
    python benchmark/curves.py "UpSkill=runs/upskill_*" "control=runs/control_*" --keys skill/mi --smooth 5

A group is a label, "=", and run folders (a pattern in quotes); groups with the same label are one. Without a label a
folder is named after itself, and a run of arithmetic_misl.py after its arms. A line is the mean over a group's runs at
the steps that all of them have. The band is the 95 % t-interval of that mean; a single run has none.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy.stats import t


@dataclass
class Args:
    groups: tyro.conf.Positional[tuple[str, ...]]  # run folders, or label=pattern
    keys: tuple[str, ...] = ("charts/reward", "eval/pass@1")  # keys of metrics.jsonl, a panel each
    x: str = "step"  # key of the horizontal axis
    smooth: int = 1  # mean over so many points of a run, up to each point
    output: str = "curves.png"  # the figure


def read_runs(groups: tuple[str, ...]) -> dict[str, list[list[dict]]]:
    """{label: its runs}; a run is the list of records of a metrics.jsonl, or of one arm and seed of it."""
    runs = defaultdict(list)
    for group in groups:
        label, _, pattern = group.partition("=")
        if "/" in label or Path(group).is_dir():  # no label, but folders that have a "=" in their names
            label, pattern = "", group
        elif not pattern:
            label, pattern = "", label
        paths = sorted(glob(f"{pattern}/metrics.jsonl"))
        if not paths:
            sys.exit(f"error: {pattern} has no metrics.jsonl; give run folders, or label=pattern in quotes.")
        for path in map(Path, paths):
            parts = defaultdict(list)
            for number, line in enumerate(path.read_text().splitlines(), 1):
                try:
                    record = json.loads(line)
                except ValueError:
                    sys.exit(f"error: {path}, line {number} is no JSON; delete the line.")
                parts[record.get("arm"), record.get("seed")].append(record)
            for (arm, _), records in parts.items():
                name = f"{label} {arm or ''}".strip()
                runs[name or path.parent.name].append(records)
    return runs


def curve(runs: list[list[dict]], key: str, x: str, smooth: int):
    """Where all runs have the key: x [n], the mean over runs [n], half its 95 % t-interval [n] (zeros for one run)."""
    series = []
    for records in runs:
        points = {record[x]: record[key] for record in records if key in record and x in record}
        xs = sorted(points)
        means = [np.mean([points[step] for step in xs[max(0, i + 1 - smooth) : i + 1]]) for i in range(len(xs))]
        series.append(dict(zip(xs, means, strict=True)))
    shared = sorted(set.intersection(*map(set, series)))
    values = np.array([[one[step] for step in shared] for one in series])  # [runs, n]
    half = np.zeros(len(shared))
    if len(runs) > 1:
        half = t.ppf(0.975, len(runs) - 1) * values.std(0, ddof=1) / len(runs) ** 0.5
    return shared, values.mean(0), half


def draw(axis, runs: dict[str, list[list[dict]]], key: str, args: Args):
    """One panel: `key` of every group that has it."""
    for i, (label, own) in enumerate(runs.items()):
        if not any(key in record for records in own for record in records):
            continue
        xs, mean, half = curve(own, key, args.x, args.smooth)
        if not xs:
            sys.exit(
                f"error: the runs of {label} have {key} at no {args.x} in common; plot them one by one, or give --x."
            )
        seeds = f" ({len(own)} runs)" if len(own) > 1 else ""
        axis.plot(xs, mean, color=f"C{i}", marker="o" if len(xs) < 20 else "", markersize=4, label=label + seeds)
        axis.fill_between(xs, mean - half, mean + half, color=f"C{i}", alpha=0.18, linewidth=0)
    axis.set(title=key, xlabel=args.x)
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.smooth < 1:
        sys.exit(f"error: --smooth {args.smooth} must be at least 1.")
    runs = read_runs(args.groups)
    records = [record for own in runs.values() for one_run in own for record in one_run]
    for key in (*args.keys, args.x):
        if not any(isinstance(record.get(key), int | float) for record in records):
            numbers = {name for record in records for name, value in record.items() if isinstance(value, int | float)}
            sys.exit(f"error: {key} is no number in these runs. They have {', '.join(sorted(numbers))}.")

    columns = min(3, len(args.keys))
    rows = -(-len(args.keys) // columns)
    figure = Figure(figsize=(max(5, 3.6 * columns), 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, key in zip(axes, args.keys, strict=False):
        draw(axis, runs, key, args)
    for axis in axes[len(args.keys) :]:
        axis.set_axis_off()
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns + 1, frameon=False)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=130)
    print(f"written: {args.output}")
