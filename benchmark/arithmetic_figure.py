"""Figure 4 of a run of arithmetic_misl.py: pass@1 and pass@N against updates, and the operators that each skill uses.

    python benchmark/arithmetic_figure.py runs/x/metrics.jsonl     # writes runs/x/figure4.png

Lines are means over seeds, bands their 95 % t-intervals. The bars are the first seed's, at the last evaluation.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from matplotlib.figure import Figure

from arithmetic_misl import OPERATORS, interval


def draw_curves(axis, records, arm, color):
    """pass@N, drawn through, and pass@1, dashed, of one arm."""
    steps = sorted({record["step"] for record in records})
    N = len(records[0]["skill/accuracy"])
    for key, style in (f"eval/pass@{N}", "-"), ("eval/pass@1", "--"):
        bands = [interval([record[key] for record in records if record["step"] == step]) for step in steps]
        mean, half = np.array(bands).T
        axis.plot(steps, mean, style, color=color, label=f"{arm}: {key.split('/')[1]}")
        axis.fill_between(steps, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)


def draw_operators(axis, record):
    """How often each skill uses each operator, and above it the skill's accuracy."""
    shares = np.array(record["skill/operators"])  # [N, 5]
    skills = range(len(shares))
    for j, operator in enumerate(OPERATORS):
        axis.bar(skills, shares[:, j], bottom=shares[:, :j].sum(1), label=operator)
    for z, accuracy in enumerate(record["skill/accuracy"]):
        axis.text(z, 1.01, f"{accuracy:.2f}", ha="center", fontsize="small")
    axis.set(title=f"{record['arm']}\n", xlabel="skill z (above: accuracy)", xticks=skills, ylim=(0, 1))


if __name__ == "__main__":
    path = Path(sys.argv[1])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    arms = list(dict.fromkeys(record["arm"] for record in records))
    widths = [2] + [1] * len(arms)
    figure = Figure(figsize=(5 + 2.6 * len(arms), 4), layout="constrained")
    axes = figure.subplots(1, 1 + len(arms), width_ratios=widths)
    for i, arm in enumerate(arms):
        own = [record for record in records if record["arm"] == arm]
        seed, step = own[0]["seed"], own[-1]["step"]
        draw_curves(axes[0], own, arm, f"C{i}")
        draw_operators(axes[i + 1], next(r for r in own if r["seed"] == seed and r["step"] == step))
    axes[0].set(xlabel="updates", ylabel="exact chance", ylim=(0, 1))
    axes[0].legend(fontsize="small", ncols=2, loc="lower center")
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path.with_name("figure4.png"), dpi=150)
    print(path.with_name("figure4.png"))
