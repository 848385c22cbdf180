"""A script of this repository and TRL's trainer side by side: the same model, prompts, group, lengths and rate.

    python benchmark/against_trl.py grpo                        # the toy, without a GPU
    python benchmark/against_trl.py dpo
    python benchmark/against_trl.py grpo --size 1.5b            # a GPU: Qwen2.5's shape, random weights, no download
    python benchmark/against_trl.py dpo --size 7b --lora-r 32

GRPO: grpo_upskill.py without skills, sampling with vLLM, against GRPOTrainer, generating with transformers or, with
--trl-vllm on a GPU, with vLLM; the loss dapo, one update a rollout, no KL, every group trained on. DPO: star_dpo.py on
saved answers against DPOTrainer on the same pairs in the same batches, its reference model run in every step (its
default) or its log-probabilities precomputed; ours stand with the time of their one reference pass, spread over the
steps. Each is a process of its own, in turn for --rounds rounds, both as a user starts them: ours sets how its CPU
threads wait, TRL leaves that to OpenMP. Printed are medians over rounds of the medians over a round's steps after the
first 3, ranges over rounds in brackets. "learner": forward, backward, clipping and optimizer. Machines are noisy:
without a GPU look at the ratios only. Random weights hardly ever draw an end token: then all completions have
--max-new-tokens tokens, for both. MFU counts 6 x parameters (LoRA: 4 x) x prompt and completion tokens, no attention.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Annotated, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ENVIRONMENT = dict(os.environ)  # for both, before an import of ours says how CPU threads wait
ROOT = Path(__file__).parents[1]
TOY, TOY_MC = ROOT / "tests" / "toy", ROOT / "tests" / "toy_mc"
sys.path.insert(0, str(ROOT))

import numpy as np
import tyro

SHAPES = {  # hidden size, MLP, layers, heads, key-value heads, tied head; the vocabulary is 151,936
    "0.5b": (896, 4864, 24, 14, 2, True),
    "1.5b": (1536, 8960, 28, 12, 2, True),
    "7b": (3584, 18944, 28, 28, 4, False),
    "tiny": (128, 256, 2, 4, 2, False),  # to try this command without a GPU
}


# Ours leaves groups without variance out, and random weights answer nothing right: answers are graded by tossing a
# coin, so that (but for 1 group in 128) every group is trained on, as TRL does. The peak of memory is written too.
COIN = """
import atexit, pathlib, random, resource, runpy, sys, torch, eval_gsm8k
coin = random.Random(1)
eval_gsm8k.is_correct = lambda answer, gold: coin.random() < 0.5
path, sys.argv = pathlib.Path(sys.argv[1]), sys.argv[2:]
peak = lambda: torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
atexit.register(lambda: path.write_text(str(peak() / 1e9)))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Args:
    method: Annotated[Literal["grpo", "dpo"], tyro.conf.Positional]
    size: Literal["toy", "tiny", "0.5b", "1.5b", "7b"] = "toy"  # a model of tests/, or random weights, Qwen2.5's shape
    lora_r: int = 0  # LoRA rank; 0 trains all weights
    steps: int = 20  # steps of a round
    rounds: int = 3  # how often each runs
    questions: int = 16  # GRPO: questions a step
    group_size: int = 8  # GRPO: completions of each; DPO: saved answers to each question, right with chance .5
    batch_size: int = 24  # DPO: pairs a step
    shuffle: Literal["questions", "all"] = "questions"  # DPO: a question's pairs side by side (our default), or not
    max_new_tokens: int = 48  # longest completion
    lr: float = 1e-4  # constant
    max_tokens_per_microbatch: int = 8192  # ours
    trl_batch: int = 0  # TRL's per-device batch; 0: a whole step at once, the fastest where memory allows
    trl_checkpointing: bool = False  # TRL with gradient checkpointing without a GPU too, its default
    trl_vllm: bool = False  # GRPO: TRL generates with vLLM too, in its process (a GPU)
    gpu_memory_utilization: float = 0.3  # vLLM's share of a GPU
    peak_tflops: float = 0.0  # of the GPU in bf16, for MFU: 989 for an H100 or H200; 0: not printed


def make_model(args, folder: Path) -> Path:
    """A model folder of tests/, or a new one: a random Qwen2 of that size with the toy's tokenizer."""
    toy = (TOY if args.method == "grpo" else TOY_MC) / "model"
    if args.size == "toy":
        return toy
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    hidden, mlp, layers, heads, kv_heads, tied = SHAPES[args.size]
    tokenizer = AutoTokenizer.from_pretrained(toy)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def make_answers(args, model: Path, folder: Path):
    """answers.jsonl for star_dpo.py, and pairs.json for TRL: star_dpo.py's own pairs in its own order for seed 1.

    Texts are shuffled words of the question, 8 to half of max_new_tokens of them.
    """
    from transformers import AutoTokenizer

    from star_dpo import load_questions, make_units, split_ids, user_message

    questions = load_questions(str(TOY_MC / "questions.jsonl"))
    tokenizer, rows, units, rng = AutoTokenizer.from_pretrained(model), [], [], np.random.default_rng(1)
    for number in split_ids(len(questions))["train"]:
        row = questions[number]
        message = [{"role": "user", "content": user_message(row, "", "")}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        for right in rng.random(args.group_size) < 0.5:
            letter = "ABCD"[("ABCD".index(row["answer"]) + (not right)) % 4]
            words = rng.permutation(row["question"].split() * 3)[: int(rng.integers(8, args.max_new_tokens // 2))]
            raw = f"{' '.join(words)}\nAnswer: {letter}{tokenizer.eos_token}"
            rows.append({"indices": number, "prompted_questions": prompt, "raw_responses": raw, "scores": float(right)})
        units = make_units(rows, "dpo", 0, 1)
        if len(units) >= args.steps * args.batch_size:
            break
    with (folder / "answers.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    permutation = np.random.default_rng([1, 0, 0]).permutation  # as star_dpo.py's first pass with seed 1
    order = permutation(len(units))
    if args.shuffle == "questions":
        order = np.argsort(permutation(len(questions))[[rows[unit[0]]["indices"] for unit in units]], kind="stable")
    pairs = []
    for i in order[: args.steps * args.batch_size]:
        right, wrong = (rows[j]["raw_responses"].removesuffix(tokenizer.eos_token) for j in units[i])
        pairs.append({"prompt": rows[units[i][0]]["prompted_questions"], "chosen": right, "rejected": wrong})
    (folder / "pairs.json").write_text(json.dumps(pairs))


def ours(args, model: Path, folder: Path) -> dict:
    """{"seconds", "rollout", "scoring", "learner", "sync", "tokens": a list over steps each, "gb", "losses"}."""
    command = [
        "--model-name", model, "--run-name", "run", "--output-dir", folder, "--lora-r", args.lora_r, "--system-prompt=",
        "--lora-alpha", 16,
        "--max-new-tokens", args.max_new_tokens, "--lr", args.lr, "--lr-schedule", "constant", "--warmup-steps", 0,
        "--weight-decay", 0, "--max-grad-norm", 1, "--max-tokens-per-microbatch", args.max_tokens_per_microbatch,
        "--gpu-memory-utilization", args.gpu_memory_utilization, "--save-every", 10**6, "--seed", 1,
    ]  # fmt: skip
    if args.method == "grpo":
        command = [
            "grpo_upskill.py", *command, "--dataset", TOY / "train.jsonl", "--eval-dataset", TOY / "test.jsonl",
            "--eval-size", 1, "--skill-prefix=", "--alpha-mi", 0, "--max-z", 1, "--questions-per-step", args.questions,
            "--group-size", args.group_size, "--num-steps", args.steps, "--answer-mode", "strict",
            "--eval-every", 10**6,
        ]  # fmt: skip
    else:
        command = [
            "star_dpo.py", *command, "--dataset", TOY_MC / "questions.jsonl", "--preamble=", "--meta-prompt=",
            "--evaluation", "none", "--num-iterations", 1, "--samples-per-question", args.group_size, "--shuffle",
            args.shuffle, "--batch-size", args.batch_size, "--preload-train", folder.parent / "answers.jsonl",
        ]  # fmt: skip
    with (folder / "log.txt").open("w") as log:
        command = [sys.executable, "-c", COIN, folder / "gb", ROOT / command[0], *command[1:]]
        command = list(map(str, command))
        if subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=ENVIRONMENT).returncode:
            sys.exit((folder / "log.txt").read_text())
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "losses/grad_norm" in record]
    if args.method == "grpo":
        seconds = [sum(r[f"time/{phase}"] for phase in ("rollout", "reward", "update", "sync")) for r in steps]
        return {
            "seconds": seconds,
            "learner": [r["time/update"] for r in steps],
            "rollout": [r["time/rollout"] for r in steps],
            "sync": [r["time/sync"] for r in steps],
            "tokens": [r["charts/tokens_per_second"] * total for r, total in zip(steps, seconds)],
            "gb": float((folder / "gb").read_text()),
        }
    result = {"learner": [r["time/update"] for r in steps], "gb": float((folder / "gb").read_text())}
    scoring = next(record["time/reference"] for record in records if "time/reference" in record) / len(steps)
    seconds = [learner + scoring for learner in result["learner"]]
    return result | {"seconds": seconds, "scoring": [scoring], "losses": [r["losses/loss"] for r in steps]}


def theirs(args, model: Path, folder: Path, precompute: bool) -> dict:
    """The same of TRL's trainer, in this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    cuda, result = torch.cuda.is_available(), defaultdict(list)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            result["seconds"].append(time.perf_counter() - self.started)

    dtype = torch.bfloat16 if args.lora_r and cuda else torch.float32
    common = {
        "model": AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        "processing_class": AutoTokenizer.from_pretrained(model),
        "callbacks": [Clock()],
    }
    if args.lora_r:
        from peft import LoraConfig

        common["peft_config"] = LoraConfig(
            r=args.lora_r, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    whole = args.questions * args.group_size if args.method == "grpo" else args.batch_size
    config = {
        "output_dir": str(folder), "learning_rate": args.lr, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "weight_decay": 0.0, "adam_beta1": 0.9, "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "seed": 1,
        "max_steps": args.steps, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "bf16": cuda, "use_cpu": not cuda, "gradient_checkpointing": cuda or args.trl_checkpointing,
        "per_device_train_batch_size": args.trl_batch or whole,
        "gradient_accumulation_steps": whole // (args.trl_batch or whole),
    }  # fmt: skip
    if args.method == "grpo":
        from eval_gsm8k import extract_answer, is_correct, load_split

        class Timed(GRPOTrainer):
            def _generate(self, *arguments, **keywords):
                started = time.perf_counter()
                output = super()._generate(*arguments, **keywords)
                result["rollout"].append(time.perf_counter() - started)
                return output

            def _generate_and_score_completions(self, inputs):
                started = time.perf_counter()
                output = super()._generate_and_score_completions(inputs)
                result["before"].append(time.perf_counter() - started)
                result["tokens"].append(float(output["completion_mask"].sum()))
                return output

        def reward(completions, gold, **_):
            texts = [completion[0]["content"] for completion in completions]
            return [2.0 * is_correct(extract_answer(text, "strict"), g) - 1 for text, g in zip(texts, gold)]

        if args.trl_vllm:
            config |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": True}
            config |= {"vllm_gpu_memory_utilization": args.gpu_memory_utilization, "vllm_max_model_length": 2048}
        config = GRPOConfig(
            **config, num_generations=args.group_size, max_completion_length=args.max_new_tokens, temperature=1.0,
            top_p=1.0, top_k=0, beta=0.0, loss_type="dapo", epsilon=0.2, epsilon_high=0.28, scale_rewards="group",
            steps_per_generation=config["gradient_accumulation_steps"], adam_beta2=0.99,
        )  # fmt: skip
        problems = load_split(str(TOY / "train.jsonl"), "train")
        rows = [{"prompt": [{"role": "user", "content": p["question"]}], "gold": p["gold"]} for p in problems]
        trainer = Timed(args=config, reward_funcs=reward, train_dataset=Dataset.from_list(rows), **common)
    else:

        class InOrder(DPOTrainer):
            def _get_train_sampler(self, *_):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        pairs = Dataset.from_list(json.loads((folder.parent / "pairs.json").read_text()))
        config = DPOConfig(**config, adam_beta2=0.95, beta=0.1, precompute_ref_log_probs=precompute, max_length=None)
        trainer = InOrder(args=config, train_dataset=pairs, **common)
    trainer.train()
    before = result.pop("before", [0.0] * args.steps)
    result |= {"learner": [whole - part for whole, part in zip(result["seconds"], before)]}
    result |= {"scoring": [whole - part for whole, part in zip(before, result["rollout"])]}
    result["gb"] = (torch.cuda.max_memory_allocated() if cuda else 1024 * getrusage(RUSAGE_SELF).ru_maxrss) / 1e9
    return result | {"losses": [record["loss"] for record in trainer.state.log_history if "loss" in record]}


def figures(args, model: Path, result: dict) -> dict:
    """{name: number} of a round."""
    first = 3 if args.steps > 3 else 0
    median = {f"s {k}": float(np.median(result[k][first:] or result[k])) for k in PHASES if result.get(k)}
    samples = args.questions * args.group_size if args.method == "grpo" else args.batch_size
    figures = {"samples/s" if args.method == "grpo" else "pairs/s": samples / median["s seconds"]}
    if args.method == "grpo":
        from transformers import AutoTokenizer

        from eval_gsm8k import encode_prompt, load_split

        tokenizer, tokens = AutoTokenizer.from_pretrained(model), float(np.mean(result["tokens"][first:]))
        problems = load_split(str(TOY / "train.jsonl"), "train")
        every = tokens + samples * np.mean([len(encode_prompt(tokenizer, p["question"], "")) for p in problems])
        figures |= {"sampled tokens/s": tokens / median["s seconds"], "learner tokens/s": every / median["s learner"]}
        if args.peak_tflops:
            size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / (4 if args.size == "toy" else 2)
            flops = (4 if args.lora_r else 6) * size * figures["learner tokens/s"]
            figures["MFU"] = flops / args.peak_tflops / 1e12
    return {**figures, **median, "peak GB": result["gb"]}


PHASES = ("seconds", "rollout", "scoring", "learner", "sync")

if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl"]:  # TRL's process: --trl {args} model folder precompute
        child, model, folder, precompute = sys.argv[2:]
        result = theirs(Args(**json.loads(child)), Path(model), Path(folder), precompute == "1")
        (Path(folder) / "result.json").write_text(json.dumps(result))
        sys.exit(0)
    args = tyro.cli(Args, description=__doc__)
    arms = {"ours": "", "TRL": "0"} | ({"TRL precomputed": "1"} if args.method == "dpo" else {})
    rounds, tables = {arm: [] for arm in arms}, {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = make_model(args, folder)
        if args.method == "dpo":
            make_answers(args, model, folder)
        for number in range(args.rounds):
            for arm, precompute in arms.items():
                own = folder / f"{arm.split()[-1]}_{number}"
                own.mkdir()
                if arm == "ours":
                    result = ours(args, model, own)
                else:
                    words = ["--trl", json.dumps(asdict(args)), str(model), str(own), precompute]
                    with (own / "log.txt").open("w") as log:
                        if subprocess.run(
                            [sys.executable, __file__, *words], stdout=log, stderr=log, env=ENVIRONMENT
                        ).returncode:
                            sys.exit((own / "log.txt").read_text())
                    result = json.loads((own / "result.json").read_text())
                rounds[arm].append(result)
                tables[arm].append(figures(args, model, result))

    def cell(values, digits):
        return f"{np.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"

    print(f"{args.method}, {args.size}, {args.rounds} rounds of {args.steps} steps")
    others = list(arms)[1:]
    print(f"{'':<18}" + "".join(f"{name:>26}" for name in [*arms, *(f"ours / {arm}" for arm in others)]))
    for key in tables["ours"][0]:
        columns = [[row.get(key) for row in tables[arm]] for arm in arms]
        ratios = [[a / b for a, b in zip(columns[0], column)] if None not in column else [] for column in columns[1:]]
        cells = [cell(column, 3 if column[0] < 10 else 0) if None not in column else "" for column in columns]
        print(f"{key:<18}" + "".join(f"{c:>26}" for c in cells + [cell(r, 2) if r else "" for r in ratios]))
    for arm in others if args.method == "dpo" and not args.lora_r else ():  # LoRA's A is drawn apart
        gap = max(abs(a - b) for x, y in zip(rounds["ours"], rounds[arm]) for a, b in zip(x["losses"], y["losses"]))
        print(f"losses of ours and of {arm} agree within {gap:.1e}")
