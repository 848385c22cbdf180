"""DPO updates of star_dpo.py beside TRL's DPOTrainer: the same model, pairs, batches and learning rate, and their losses.

    python benchmark/dpo_throughput.py                                   # the toy, two CPU threads, several minutes

Samples answers once with star_dpo.py, then trains one pass over their pairs with both, TRL with its reference model run
in every step (its default) and with precomputed reference log-probabilities. Times are whole steps (forward, backward,
clipping, optimizer; for TRL from on_step_begin to on_step_end, its data loading and logging left out), medians after the
first three; with one micro-batch a step for both. Ours are also given with the time of its reference pass added, spread
over the steps. Machines are noisy: compare the ratios of one call.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import tyro


@dataclass
class Args:
    questions: int = 400  # training questions
    samples: int = 8  # answers sampled to each
    batch_size: int = 24  # pairs a step
    shuffle: str = "questions"  # order of the pairs, the same for both: pairs, or questions with their pairs together
    steps: int = 40  # steps measured and compared
    lr: float = 1e-4  # learning rate, constant


def ours(args, folder: Path, name: str, *extra) -> list[dict]:
    """Records of metrics.jsonl of a run of star_dpo.py on the toy."""
    toy = ROOT / "tests" / "toy_mc"
    command = [
        sys.executable, ROOT / "star_dpo.py", "--model-name", toy / "model", "--dataset", toy / "questions.jsonl",
        "--lora-r", 0, "--system-prompt=", "--preamble=", "--meta-prompt=", "--max-new-tokens", 48, "--evaluation",
        "none", "--num-iterations", 1, "--output-dir", folder, "--run-name", name, "--num-train-questions",
        args.questions, "--samples-per-question", args.samples, "--batch-size", args.batch_size, "--lr", args.lr,
        "--lr-schedule", "constant", "--warmup-steps", 0, "--weight-decay", 0, "--max-tokens-per-microbatch", 65536,
        "--shuffle", args.shuffle, "--save-every", 0, *extra,
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


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

    toy = ROOT / "tests" / "toy_mc" / "model"
    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)
    config = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=1,
        learning_rate=args.lr, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, adam_beta1=0.9,
        adam_beta2=0.95, max_grad_norm=1.0, beta=0.1, max_steps=args.steps, logging_steps=1, save_strategy="no",
        report_to=[], bf16=False, gradient_checkpointing=False, precompute_ref_log_probs=precompute, max_length=None,
        use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = InOrder(
        model=model, args=config, train_dataset=Dataset.from_list(pairs), callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(toy),
    )  # fmt: skip
    for row in trainer.train_dataset.select(range(3)):  # the ids are those that star_dpo.py trains on
        assert {len(row[key]) for key in row if key.endswith("ids")}, row
    trainer.train()
    return seconds, [record["loss"] for record in trainer.state.log_history if "loss" in record]


if __name__ == "__main__":
    args = tyro.cli(Args)
    from star_dpo import make_units

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        records = ours(args, folder, "ours")
        steps = [record for record in records if "time/forward_backward" in record][: args.steps]
        rows = [json.loads(line) for line in (folder / "ours" / "train_1" / "generated.jsonl").open()]
        units = make_units(rows, "dpo", 0, 1, 1)
        order = json.loads((folder / "ours" / "order.json").read_text())
        pairs = []
        for i in order[: args.steps * args.batch_size]:
            chosen, rejected = (rows[j] for j in units[i])
            pairs.append(
                {"prompt": chosen["prompted_questions"]}
                | {
                    name: row["raw_responses"].removesuffix("<|im_end|>")
                    for name, row in (("chosen", chosen), ("rejected", rejected))
                }
            )
        results = {
            precompute: theirs(args, pairs, folder / f"trl{precompute}", precompute) for precompute in (False, True)
        }
    reference = next(record["time/scoring"] for record in records if "time/scoring" in record) / len(
        [record for record in records if "time/forward_backward" in record]
    )
    own = np.median([record["time/forward_backward"] for record in steps][3:])
    print(f"{len(steps)} steps of {args.batch_size} pairs, order by {args.shuffle}")
    print(f"star_dpo.py                {own:.4f} s a step, {own + reference:.4f} s with its reference pass")
    for precompute, (seconds, losses) in results.items():
        median = np.median(seconds[3:])
        share = own if precompute else own + reference
        gap = max(abs(a - b["losses/loss"]) for a, b in zip(losses, steps, strict=True))
        print(
            f"TRL, precompute_ref {precompute!s:<6} {median:.4f} s a step: {median / share:.2f} times; largest difference "
            f"of a step's loss {gap:.1e}"
        )
