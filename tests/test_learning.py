"""The README's demo, shortened: UpSkill learns answers and skills on the toy; with shuffled rewards it learns nothing.

The toy is a toy: these margins say that the parts work together, not what the method is worth.
"""

import json
import re

import pytest
from conftest import ROOT, TOY, training

README = (ROOT / "README.md").read_text()


def readme_command():
    """The demo's command as it stands in the README."""
    command = re.search(r"^python (grpo_upskill\.py .*?)\n```", README, re.DOTALL | re.MULTILINE).group(1)
    return command.replace("\\\n", " ")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    import shlex
    import sys

    command = [sys.executable, *shlex.split(readme_command())]
    folders = {}
    arms = {"upskill": ["--num-steps", 50], "shuffled": ["--num-steps", 30, "--shuffle-rewards"]}
    for name, extra in arms.items():
        folder = tmp_path_factory.mktemp(name)
        process = training(*extra, "--eval-size", 150, "--output-dir", folder, "--run-name", "run", command=command)
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
    assert after["skill/eval_mi_over_ln_n"] >= 0.5 > before["skill/eval_mi_over_ln_n"]
    assert after["skill/eval_z_decoded"] >= 0.7


def test_shuffled_rewards_teach_nothing(folders):
    before, after = evaluations(folders["shuffled"])
    assert after["eval/pass@1"] <= before["eval/pass@1"] + 0.05
    assert after["skill/eval_mi_over_ln_n"] <= 0.15


def test_engine_and_trainer_agree_all_the_way(folders):
    for folder in folders.values():
        for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
            assert record.get("rollout/logp_diff_max", 0.0) < 1e-4


def test_final_folder_is_the_trained_model(folders):
    """final/ loads with transformers alone and holds weights that differ from the start."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = AutoModelForCausalLM.from_pretrained(folders["upskill"] / "final")
    start = AutoModelForCausalLM.from_pretrained(TOY / "model").state_dict()
    assert final.dtype == torch.float32
    assert any((weight - start[name]).abs().max() > 1e-3 for name, weight in final.state_dict().items())
    assert AutoTokenizer.from_pretrained(folders["upskill"] / "final").chat_template
