"""Options that no other run uses, in small runs as a user would start them."""

import json
import shutil

import pytest
from conftest import TOY, training
from transformers import AutoTokenizer

RUNS = {
    "no skills, no pad token": [
        *("--skill-prefix", "", "--alpha-mi", 0, "--is-cap", 0, "--loss-type", "dr_grpo"),
        *("--advantage-scale", "none", "--lr-schedule", "linear"),
    ],
    "MI alone, token form": [
        *("--mi-form", "token", "--correct-coef", 0, "--advantage-scale", "batch", "--no-drop-zero-variance"),
        *("--temperature", 0.8, "--eval-temperature", 0, "--eval-samples", 2, "--lr-schedule", "constant"),
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, tmp_path):
    shutil.copytree(TOY / "model", tmp_path / "model")
    if "no pad token" in name:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path / "model")
        assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id is None
    process = training(
        *RUNS[name], "--model-name", tmp_path / "model", "--output-dir", tmp_path, "--lora-r", 0, "--num-steps", 2
    )
    output = process.communicate()[0]
    assert process.returncode == 0, output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "global_step" in record]
    assert len(steps) == 2 and all(record["losses/grad_norm"] > 0 for record in steps)
    assert all(record["rollout/logp_diff_max"] < 1e-4 for record in steps)
    assert all(("skill/mi" in record) == ("MI" in name) for record in steps)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
