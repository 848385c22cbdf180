"""DPO updates of star_dpo.py and of TRL's DPOTrainer: the same model, pairs, batches and rate; their times and losses.

    python benchmark/dpo_throughput.py                       # the toy, two CPU threads, some minutes
    python benchmark/dpo_throughput.py --shuffle none        # pairs of a question side by side, in the same batches

Samples answers once with star_dpo.py, then trains one pass over their pairs with both; TRL once with its reference
model run in every step (its default) and once with precomputed reference log-probabilities. Times are of whole steps:
forward, backward, clipping, optimizer (TRL: on_step_begin to on_step_end; its data loading and logging are left out),
medians after the first three, one micro-batch a step for both. Ours stand against TRL's default with the time of their
one reference pass added, spread over the steps. Machines are noisy: compare the ratios of one call.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).parents[1]
TOY = ROOT / "tests" / "toy_mc"
sys.path.insert(0, str(ROOT))

import numpy as np
import tyro


@dataclass
class Args:
    questions: int = 400  # training questions
    samples: int = 8  # answers sampled to each
    batch_size: int = 24  # pairs a step
    shuffle: Literal["all", "none"] = "all"  # order of the pairs, the same for both
    steps: int = 40  # steps measured and compared
    lr: float = 1e-4  # learning rate, constant


def ours(args, folder: Path) -> list[dict]:
    """Records of metrics.jsonl of one iteration of star_dpo.py on the toy."""
    command = [
        sys.executable, ROOT / "star_dpo.py", "--model-name", TOY / "model", "--dataset", TOY / "questions.jsonl",
        "--lora-r", 0, "--system-prompt=", "--preamble=", "--meta-prompt=", "--max-new-tokens", 48, "--evaluation",
        "none", "--num-iterations", 1, "--output-dir", folder, "--run-name", "ours", "--num-train-questions",
        args.questions, "--samples-per-question", args.samples, "--batch-size", args.batch_size, "--lr", args.lr,
        "--lr-schedule", "constant", "--warmup-steps", 0, "--weight-decay", 0, "--max-tokens-per-microbatch", 65536,
        "--shuffle", args.shuffle, "--save-every", 0,
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]


def theirs(args, pairs: list[dict], folder: Path, precompute: bool) -> tuple[list[float], list[float]]:
    """(seconds, losses) of the steps of TRL's DPOTrainer on the pairs in their order."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.started)

    config = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=1,
        learning_rate=args.lr, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, adam_beta1=0.9,
        adam_beta2=0.95, max_grad_norm=1.0, beta=0.1, max_steps=args.steps, logging_steps=1, save_strategy="no",
        report_to=[], bf16=False, gradient_checkpointing=False, precompute_ref_log_probs=precompute, max_length=None,
        use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(TOY / "model", dtype=torch.float32), args=config,
        train_dataset=Dataset.from_list(pairs), processing_class=AutoTokenizer.from_pretrained(TOY / "model"),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return seconds, [record["loss"] for record in trainer.state.log_history if "loss" in record]


if __name__ == "__main__":
    args = tyro.cli(Args)
    from star_dpo import make_units

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        records = ours(args, folder)
        rows = [json.loads(line) for line in (folder / "ours" / "samples" / "train_1.jsonl").open()]
        units = make_units(rows, "dpo", 0, 1, 1)
        order = np.random.default_rng([1, 0, 0]).permutation(len(units))  # as star_dpo.py with seed 1
        order = order if args.shuffle == "all" else np.arange(len(units))
        pairs = []
        for i in order[: args.steps * args.batch_size]:
            right, wrong = (rows[j]["raw_responses"].removesuffix("<|im_end|>") for j in units[i])
            pairs.append({"prompt": rows[units[i][0]]["prompted_questions"], "chosen": right, "rejected": wrong})
        results = {once: theirs(args, pairs, folder / "trl", once) for once in (False, True)}
    steps = [record for record in records if "losses/loss" in record]
    scoring = next(record["time/scoring"] for record in records if "time/scoring" in record) / len(steps)
    steps = steps[: args.steps]
    own = np.median([record["time/forward_backward"] for record in steps][3:])
    print(f"\n{len(steps)} steps of {args.batch_size} pairs, --shuffle {args.shuffle}")
    print(f"star_dpo.py              {own:.4f} s a step, {own + scoring:.4f} s with its share of the reference pass")
    for once, (seconds, losses) in results.items():
        median = np.median(seconds[3:])
        gap = max(abs(a - b["losses/loss"]) for a, b in zip(losses, steps, strict=True))
        ratio = median / (own if once else own + scoring)
        name = "precomputed" if once else "default"
        print(f"TRL, {name:<11}         {median:.4f} s a step: {ratio:.2f} times ours; losses within {gap:.1e}")
