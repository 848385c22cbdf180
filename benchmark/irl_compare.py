"""MLE, MLE + entropy and IRL with several seeds: runs of irl_imitation.py, a table and a figure of them.

    python benchmark/irl_compare.py --max-train-rows 500     # arguments of irl_imitation.py follow
    python benchmark/irl_compare.py --arms lambda-td=0 lambda-td=0.1,gamma=0.95 --seeds 1 2 --model-name ...

Every run is a process and a folder of its own under output_dir/run_name, all with the same data order; there
compare.txt and compare.png are written. The same command goes on where it was stopped; runs that are complete are not
repeated. +-: standard error over seeds. "- first": difference from the first arm, with a paired bootstrap interval over
questions, for these very seeds.
"""

import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas
import tyro
from matplotlib.figure import Figure
from scipy.stats import bootstrap

from irl_imitation import self_bleu


@dataclass
class Args:
    run_name: str = "irl_compare"  # folder under output_dir
    output_dir: str = "runs"  # where it is made
    arms: tuple[str, ...] = (  # arguments of each, joined by commas; the others are compared with the first
        "lambda-td=0", "lambda-td=0,entropy-coef=0.03", "lambda-td=0,entropy-coef=0.1", "lambda-td=0.03",
        "lambda-td=0.1", "lambda-td=0.3")  # fmt: skip
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of every arm


def per_question(run_dir: Path, num_samples: int) -> pandas.DataFrame:
    """Accuracy and Self-BLEU of each question's samples, in the order of questions."""
    rows = pandas.read_json(run_dir / "completions.jsonl", lines=True)
    groups = rows.groupby("id")
    bleu = groups["completion"].agg(lambda texts: self_bleu(list(texts), num_samples))
    return pandas.DataFrame({"pass@1": groups["correct"].mean(), "self_bleu": bleu})


def difference(a, b) -> str:
    """mean(a) - mean(b) over the same questions, with the 95 % bootstrap interval over questions."""
    paired = (a - b).to_numpy()
    low, high = paired.mean(), paired.mean()  # of the first arm itself there is nothing to resample
    if paired.any():
        low, high = bootstrap((paired,), np.mean, method="percentile", batch=100, rng=0).confidence_interval
    return f"{paired.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    args, rest = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    if not args.arms or not args.seeds or re.search(r"\beval[-_]", " ".join(args.arms)):
        sys.exit("error: give --arms, all to be evaluated alike, and --seeds.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # subprocess.run then stops the run that it waits for
    folder, lines, first = Path(args.output_dir) / args.run_name, {}, None
    axis = Figure(figsize=(7, 5)).subplots()
    for arm in args.arms:
        figures, samples = [], []
        for seed in args.seeds:
            print(f"\n==== {arm}, seed {seed}", flush=True)
            run_dir = folder / f"{arm.replace('/', '_')}__{seed}"
            own = [f"--output-dir={folder}", f"--run-name={run_dir.name}", f"--seed={seed}"]
            own += [f"--{setting}" for setting in arm.split(",")]
            code = subprocess.run([sys.executable, ROOT / "irl_imitation.py", *rest, *own]).returncode
            if code:
                sys.exit(f"error: {arm}, seed {seed} ended with exit code {code}; the same command goes on from there.")
            num_samples = json.loads((run_dir / "args.json").read_text())["eval_samples"]
            figures.append(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1]))
            samples.append(per_question(run_dir, num_samples))
        questions = pandas.concat(samples).groupby(level=0).mean()
        first = questions if first is None else first
        figures = pandas.DataFrame(figures)
        mean, error = figures.mean(), figures.sem()
        line = {}
        for name in ("pass@1", "self_bleu", "sample_entropy", "greedy", f"pass@{num_samples}", "val_mle"):
            line[name] = f"{mean[f'eval/{name}']:.4f} +- {error[f'eval/{name}']:.4f}"
        for name in ("pass@1", "self_bleu"):
            line[f"{name} - first"] = difference(questions[name], first[name])
        for name in ("sum", "log_pi"):
            line[f"{name}_spearman"] = round(mean.get(f"reward/{name}_spearman", math.nan), 3)
        lines[arm] = line
        x, y = ["eval/pass@1", "eval/self_bleu"], ["eval/self_bleu", "eval/pass@1"]
        axis.errorbar(*mean[x], *error[y], marker="o", capsize=2, label=arm)  # errors of y come first
    text = pandas.DataFrame(lines).T.to_string()
    (folder / "compare.txt").write_text(text + "\n")
    axis.set(xlabel="accuracy (pass@1)", ylabel=f"Self-BLEU of {num_samples} samples (lower: more diverse)")
    axis.legend()
    axis.figure.savefig(folder / "compare.png", dpi=120, bbox_inches="tight")
    print(f"\n{text}\nwritten: {folder}/compare.txt, {folder}/compare.png")
