"""The commands for the toy, shortened: every script learns there, and with shuffled rewards nothing is learned.

The toy is a toy: these margins say that the parts work together, not what a method is worth. Shuffling is the same text
in every script and is tried in one.
"""

import json
import math
import re

import pytest
from conftest import ENCODER, TOY, toy_command, training

ARMS = {
    "upskill": ("grpo_upskill.py", ["--num-steps", 42, "--questions-per-step", 10, "--eval-samples", 1]),
    "shuffled": (
        "grpo_upskill.py",
        ["--num-steps", 12, "--questions-per-step", 8, "--shuffle-rewards", "--eval-samples", 1],
    ),
    "perplexity": ("grpo_perplexity.py", ["--num-steps", 15, "--eval-every", 1000, "--lr", 5e-4]),
    "memory": (
        "grpo_knn_memory.py",
        ["--num-steps", 15, "--questions-per-step", 10, "--eval-every", 1000, "--lr", 5e-4, "--embed-model", ENCODER],
    ),
}


PAGES = {
    "grpo_upskill.py": "tests/toy/demo.sh",
    "grpo_perplexity.py": "docs/grpo_perplexity.md",
    "grpo_knn_memory.py": "docs/grpo_knn_memory.md",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for name, (script, extra) in ARMS.items():
        folder = tmp_path_factory.mktemp(name)
        command = toy_command(PAGES[script], f"{script} --model-name tests/toy/model ")
        process = training(*extra, "--eval-size", 80, "--output-dir", folder, "--run-name", "run", command=command)
        output = process.communicate()[0]
        assert process.returncode == 0, output
        assert re.search(r"eval/pass@1 +0\.\d+ +0\.\d+", output)
        folders[name] = folder / "run"
    return folders


def evaluations(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "eval/pass@1" in record]


def test_upskill_learns_answers_and_skills(folders):
    before, after = evaluations(folders["upskill"])
    assert after["eval/pass@1"] >= before["eval/pass@1"] + 0.06
    assert after["eval/pass@5"] >= before["eval/pass@5"] + 0.03
    assert after["eval/mi"] >= 0.5 * math.log(5) > before["eval/mi"]
    assert after["eval/z_decoded"] >= 0.7


def test_shuffled_rewards_teach_nothing(folders):
    before, after = evaluations(folders["shuffled"])
    assert after["eval/pass@1"] <= before["eval/pass@1"] + 0.05
    assert after["eval/mi"] <= 0.15 * math.log(5)


def test_perplexity_reward_lowers_perplexity_and_raises_accuracy(folders):
    before, after = evaluations(folders["perplexity"])
    assert after["eval/pass@1"] >= before["eval/pass@1"] + 0.06
    assert after["eval/ppl"] <= 0.8 * before["eval/ppl"]
    assert after["eval/q_accuracy"] >= before["eval/q_accuracy"] + 0.06
    assert after["eval/ppl_swapped"] > 10 * after["eval/ppl"]


def test_memory_reward_learns(folders):
    before, after = evaluations(folders["memory"])
    assert after["eval/pass@1"] >= before["eval/pass@1"] + 0.06


def test_engine_and_trainer_agree_all_the_way(folders):
    for folder in folders.values():
        for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
            assert record.get("rollout/logp_diff", 0.0) < 1e-6


def test_final_folder_is_the_trained_model(folders):
    """final/ loads with transformers alone and holds weights that differ from the start."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = AutoModelForCausalLM.from_pretrained(folders["upskill"] / "final")
    start = AutoModelForCausalLM.from_pretrained(TOY / "model").state_dict()
    assert final.dtype == torch.float32
    assert any((weight - start[name]).abs().max() > 1e-3 for name, weight in final.state_dict().items())
    assert AutoTokenizer.from_pretrained(folders["upskill"] / "final").chat_template
