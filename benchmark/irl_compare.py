"""MLE, MLE + entropy and IRL with several seeds: runs of irl_imitation.py, a table and a figure of them.

    python benchmark/irl_compare.py --skip-first-eval --max-train-rows 500     # arguments of irl_imitation.py follow
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

import pandas
import tyro
from matplotlib.figure import Figure

from first_edition import fail, paired_bootstrap


@dataclass
class Args:
    run_name: str = "irl_compare"  # folder under output_dir
    output_dir: str = "runs"  # where it is made
    arms: tuple[str, ...] = (  # arguments of each, joined by commas; the others are compared with the first
        "lambda-td=0", "lambda-td=0,entropy-coef=0.03", "lambda-td=0,entropy-coef=0.1", "lambda-td=0.03",
        "lambda-td=0.1", "lambda-td=0.3")  # fmt: skip
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of every arm


if __name__ == "__main__":
    args, rest = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    if not args.arms or not args.seeds or re.search(r"\beval[-_]", " ".join(args.arms)):
        fail("give --arms, all to be evaluated alike, and --seeds.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # subprocess.run then stops the run that it waits for
    folder, lines, first = Path(args.output_dir) / args.run_name, {}, None
    axis = Figure(figsize=(7, 5)).subplots()
    for arm in args.arms:
        figures, samples, lines[arm] = [], [], {}
        for seed in args.seeds:
            print(f"\n==== {arm}, seed {seed}", flush=True)
            run_dir = folder / f"{arm.replace('/', '_')}__{seed}"
            own = [f"--output-dir={folder}", f"--run-name={run_dir.name}", f"--seed={seed}"]
            own += [f"--{setting}" for setting in arm.split(",")]
            if code := subprocess.run([sys.executable, ROOT / "irl_imitation.py", *rest, *own]).returncode:
                fail(f"{arm}, seed {seed} ended with exit code {code}, see above; the same command goes on from there.")
            figures.append(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1]))
            rows = pandas.read_json(run_dir / "rewards.jsonl", lines=True)
            samples.append(rows.loc[rows.kind == "sample", ["id", "correct", "self_bleu"]])
        questions, figures, line = pandas.concat(samples).groupby("id").mean(), pandas.DataFrame(figures), lines[arm]
        mean, error, first = figures.mean(), figures.sem(), questions if first is None else first
        k = json.loads((run_dir / "args.json").read_text())["eval_samples"]
        for name in ("pass@1", "self_bleu", "sample_entropy", "greedy", f"pass@{k}", "val_mle"):
            line[name] = f"{mean[f'eval/{name}']:.4f} +- {error[f'eval/{name}']:.4f}"
        for column, name in ("correct", "pass@1"), ("self_bleu", "self_bleu"):
            difference, low, high, _ = paired_bootstrap(questions[column], first[column]).values()
            line[f"{name} - first"] = f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]"
        line |= {f"{x}_spearman": round(mean.get(f"reward/{x}_spearman", math.nan), 3) for x in ("sum", "log_pi")}
        x, y = ["eval/pass@1", "eval/self_bleu"], ["eval/self_bleu", "eval/pass@1"]
        axis.errorbar(*mean[x], *error[y], marker="o", capsize=2, label=arm)  # errors of y come first
    text = pandas.DataFrame(lines).T.to_string()
    (folder / "compare.txt").write_text(text + "\n")
    axis.set(xlabel="accuracy (pass@1)", ylabel=f"Self-BLEU of {k} samples (lower: more diverse)")
    axis.legend()
    axis.figure.savefig(folder / "compare.png", dpi=120, bbox_inches="tight")
    print(f"\n{text}\nwritten: {folder}/compare.txt, {folder}/compare.png")
