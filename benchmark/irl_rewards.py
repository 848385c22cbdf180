"""Token rewards of a right and of a wrong sample of a run of irl_imitation.py, as heat maps.

    python benchmark/irl_rewards.py runs/my_run     # reads rewards.jsonl of its newest evaluation, draws rewards.png

Of one question if there is one with both.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

WIDTH = 16  # tokens in a line


def plot_rewards(rows: list[dict], tokenizer, path: Path):
    """Draw the two samples of `rows` (rows of rewards.jsonl of kind "sample") into `path`."""
    questions = {row["id"]: {} for row in rows}
    for row in rows:
        questions[row["id"]].setdefault(row["correct"], row)
    shown = {}
    for samples in sorted(questions.values(), key=len):  # the last stays: with both, if there is such a question
        shown |= samples
    limit = max(abs(reward) for row in shown.values() for reward in row["rewards"]) or 1
    axes = Figure(figsize=(10 * len(shown), 6)).subplots(1, len(shown), squeeze=False)[0]
    for axis, (correct, row) in zip(axes, sorted(shown.items(), reverse=True), strict=True):
        cells = row["rewards"] + [math.nan] * (-len(row["rewards"]) % WIDTH)
        axis.imshow(np.reshape(cells, (-1, WIDTH)), "RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for i, token in enumerate(row["tokens"]):
            piece = repr(tokenizer.decode([token]))[1:-1].replace("$", r"\$")
            axis.text(i % WIDTH, i // WIDTH, piece, ha="center", va="center", size=8)
        axis.set_title(f"{'right' if correct else 'wrong'}: sum {row['sum']:.2f}; red < 0 < blue, up to {limit:.2f}")
        axis.axis("off")
    axes[0].figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    from transformers import AutoTokenizer

    folder = Path(sys.argv[1])
    rows = [json.loads(line) for line in (folder / "rewards.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(json.loads((folder / "args.json").read_text())["model_name"])
    plot_rewards([row for row in rows if row["kind"] == "sample"], tokenizer, folder / "rewards.png")
    print(f"written: {folder}/rewards.png")
