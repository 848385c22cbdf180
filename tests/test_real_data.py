"""The data and evaluation path on real input: GSM8K's questions through Qwen2.5's tokenizer and vLLM.

The files are looked for in ../shared/data (GSM8K_DIR and QWEN_TOKENIZER_DIR name other places); without them these
tests skip. The model is a two-layer Qwen2 with random weights and Qwen2.5's vocabulary of 151,936: it can answer
nothing; that prompts, log-probabilities, sync (with tied embeddings), evaluation and saved model are right is tested.
"""

import csv
import json
import os
import pathlib
import re
import sys

import pytest
import torch
from conftest import ENCODER, ROOT, training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from eval_gsm8k import encode_prompt, load_split
from grpo_perplexity import target_ids
from star_dpo import Args, load_questions, split_ids, user_message

DATA = ROOT.parent / "shared" / "data"
GSM8K = pathlib.Path(os.environ.get("GSM8K_DIR", DATA / "gsm8k"))
MMLU = pathlib.Path(os.environ.get("MMLU_DIR", DATA / "mmlu")) / "mmlu_test.jsonl"
QWEN = pathlib.Path(os.environ.get("QWEN_TOKENIZER_DIR", DATA / "tokenizer_qwen2.5"))
pytestmark = pytest.mark.skipif(
    not (GSM8K / "train.jsonl").exists() or not (QWEN / "tokenizer.json").exists(),
    reason=f"no GSM8K in {GSM8K} or no tokenizer in {QWEN}",
)
SYSTEM = "You are a helpful math assistant that solves problems step by step."


def test_prompts():
    """Every question comes through the chat template whole and once, with generation header and prefix in place."""
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    problems = [problem for split in ("train", "test") for problem in load_split(str(GSM8K / f"{split}.jsonl"), split)]
    assert len(problems) == 7473 + 1319
    for problem in problems[::40]:
        text = tokenizer.decode(encode_prompt(tokenizer, f"Strategy 3 | {problem['question']}", SYSTEM))
        assert text == (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nStrategy 3 | {problem['question']}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


@pytest.mark.parametrize("target", ["answer", "solution", "solution_answer"])
def test_perplexity_targets(target):
    """Context and target, tokenised apart, are the tokens of both together, behind a reasoning as GSM8K has it."""
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    problems = load_split(str(GSM8K / "train.jsonl"), "train")
    negative = [problem for problem in problems if problem["gold"].startswith("-")]
    templates = {"<think>\n{reasoning}\n</think>\n<answer>\n{answer}\n</answer>": "\n"}  # template: end of a target
    templates["{reasoning}\nSo:\n{answer}"] = tokenizer.eos_token
    if target == "answer":
        templates["{reasoning}\n#### {answer}"] = tokenizer.eos_token  # a space stays apart from a digit, too
    for template, end in templates.items():
        asked = problems[::50] + (negative if "####" not in template else [])
        _, cue, closing = re.split(r"\{reasoning\}|\{answer\}", template)
        for problem in asked:
            context = template.replace("{reasoning}", problem["answer"].split("\n####")[0]).split("{answer}")[0]
            ids = target_ids(problem, target, cue, closing, tokenizer)
            text = tokenizer.decode(ids)
            assert text.endswith(end) and encode(context) + ids == encode(context + text)
            if target == "answer":
                assert text == problem["gold"] + end
    with pytest.raises(SystemExit, match="merges with .* of --template; put {answer} on a line of its own"):
        target_ids(negative[0], target, "\n#### ", "", tokenizer)  # " -" is one token


SCRIPTS = {
    "grpo_upskill": ["--group-size", 4, "--max-z", 2, "--system-prompt", SYSTEM],
    "grpo_perplexity": ["--group-size", 4, "--reward-type", "accuracy", "--lora-r", 8],  # a random model writes no tags
    "grpo_knn_memory": [
        *("--group-size", 4, "--lora-r", 8, "--embed-model", ENCODER, "--num-shots", 1, "--explore-warmup-steps", 0)
    ],
}


def save_tied_model(folder):
    """A tied model of two layers with a vocabulary of 151,936, and its tokenizer, which is returned."""
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_on_gsm8k(script, tmp_path):
    """One step of LoRA training and two evaluations of a tied model with a vocabulary of 151,936."""
    save_tied_model(tmp_path / "model")
    command = [sys.executable, str(ROOT / f"{script}.py"), "--model-name", str(tmp_path / "model"), "--run-name", "run"]
    command += ["--dataset", str(GSM8K / "train.jsonl"), "--eval-dataset", str(GSM8K / "test.jsonl")]
    command += ["--num-steps", "1", "--max-new-tokens", "12", "--eval-size", "4", "--questions-per-step", "2"]
    process = training(*SCRIPTS[script], "--output-dir", tmp_path, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 1]
    nothing_known = torch.tensor(151_936.0).log().item()
    if script == "grpo_perplexity":  # equal rewards: no update; the frozen model knows nothing about the answer
        assert torch.tensor(records[0]["eval/ppl"]).log().item() == pytest.approx(nothing_known, abs=0.2)
    else:
        assert records[1].get("rollout/logp_diff_max", 0) < 1e-4 and records[1].get("rollout/logp_diff", 0) < 1e-6
        assert records[1]["losses/entropy"] == pytest.approx(nothing_known, abs=0.1)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert final.lm_head.weight.data_ptr() == final.model.embed_tokens.weight.data_ptr()  # still tied


@pytest.mark.skipif(not MMLU.exists(), reason=f"no MMLU in {MMLU}")
def test_star_on_mmlu(tmp_path):
    """All of MMLU, and samples in the original's .csv with Llama's end token: DPO with LoRA takes its steps on them."""
    questions, args, rows = load_questions(str(MMLU)), Args(), []
    for i in split_ids(14042)["train"][:6]:
        asked = user_message(questions[i], args.preamble, args.meta_prompt)
        for letter in "ABCD":
            right = letter == questions[i]["answer"]
            rows.append([i, f"<|begin_of_text|>{asked}<|eot_id|>", letter, f"Answer: {letter}<|eot_id|>", float(right)])
    with open(tmp_path / "samples.csv", "w", newline="") as file:
        header = ["indices", "prompted_questions", "model_answers", "raw_responses", "scores"]
        csv.writer(file).writerows([header, *rows])
    tokenizer = save_tied_model(tmp_path / "model")
    command = [sys.executable, str(ROOT / "star_dpo.py"), "--model-name", str(tmp_path / "model"), "--run-name", "run"]
    command += ["--dataset", str(MMLU), "--preload-train", str(tmp_path / "samples.csv"), "--num-train-questions", "6"]
    command += [
        "--eval-size",
        "3",
        "--max-new-tokens",
        "12",
        "--num-iterations",
        "1",
        "--batch-size",
        "9",
        "--lr",
        "1e-3",
    ]
    process = training("--output-dir", tmp_path, "--warmup-steps", 1, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "losses/loss" in record]
    assert steps[0]["losses/loss"] == pytest.approx(0.6931471806, abs=1e-6) and len(steps) == 2
    nothing_known = torch.tensor(151_936.0).log().item()
    assert steps[0]["dpo/chosen_nll"] == pytest.approx(nothing_known, abs=0.2)
    tokens = len(tokenizer("Answer: A")["input_ids"]) + 1  # and the end token
    assert steps[0]["dpo/chosen_logp"] == pytest.approx(-tokens * steps[0]["dpo/chosen_nll"], rel=1e-4)
    evaluated = [record for record in records if "eval/accuracy" in record]
    assert len(evaluated) == 2 and evaluated[0]["eval/no_answer"] == 1.0 and evaluated[0]["eval/length"] == 12


def test_irl_on_gsm8k_with_the_original_s_architecture(tmp_path):
    """A step of IRL with LoRA, exact KL, own samples on GPT-NeoX (Pythia), vocabulary 151,936, no chat template."""
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    tokenizer.chat_template = None
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=151_936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "few.jsonl").write_text("".join((GSM8K / "train.jsonl").read_text().splitlines(keepends=True)[:40]))
    command = [sys.executable, str(ROOT / "irl_imitation.py"), "--model-name", str(tmp_path / "model")]
    process = training(
        *("--dataset", tmp_path / "few.jsonl", "--max-train-rows", 4, "--eval-size", 3, "--eval-samples", 2),
        *("--num-train-epochs", 1, "--batch-size", 4, "--lora-r", 8, "--lambda-kl", 0.1, "--online-alpha", 0.1),
        *(
            "--run-name",
            "run",
            "--output-dir",
            tmp_path,
            "--max-new-tokens",
            60,
            "--eval-dataset",
            GSM8K / "test.jsonl",
        ),
        command=command,
    )
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "4 demonstrations" in output and "4 held out" in output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    nothing_known = torch.tensor(151_936.0).log().item()
    assert [row["step"] for row in rows] == [0, 1, 1]
    assert all(row["rollout/logp_diff"] < 1e-5 for row in rows)
    assert rows[1]["losses/mle"] == pytest.approx(nothing_known, abs=0.2)
    scored = [json.loads(line) for line in (tmp_path / "run" / "rewards.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in scored] == ["held_out"] * 4 + ["sample"] * 6
    question = json.loads((GSM8K / "test.jsonl").read_text().splitlines()[0])["question"]
    assert tokenizer.decode(scored[4]["prompt"]) == f"QUESTION: {question}\n\nSOLUTION:"
    assert tokenizer.decode(scored[0]["tokens"]).startswith(" ")
