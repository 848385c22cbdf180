"""What a user can get wrong: one sentence that says what, where and what to do; exit code 2; nothing written."""

import json
import shutil
import sys
import types

import pytest
from conftest import TOY, stop_message, training
from transformers import AutoTokenizer

GOOD = {"question": "1 + 1?", "answer": "#### 2"}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


ARGUMENTS = {
    "group of one": (["--group-size", 1, "--max-z", 1, "--alpha-mi", 0], "--group-size 1 must be"),
    "group no multiple of N": (["--group-size", 5], "--group-size 5 must be a multiple of the 2 skills"),
    "one completion of each z": (["--group-size", 2, "--group-by", "skill"], "--group-size must be at least 4"),
    "prefix without z": (["--skill-prefix", "Strategy | "], "has no {z} in it"),
    "no skills but MI": (["--skill-prefix", ""], "add --alpha-mi 0"),
    "no steps": (["--num-steps", 0], "--num-steps is 0; it must be over 0"),
    "greedy training": (["--temperature", 0], "--temperature is 0.0; it must be over 0"),
    "negative": (["--lr", -1], "--lr is -1.0; it must be at least 0"),
    "not a number": (["--kl-coef", "nan"], "--kl-coef is nan"),
    "too few problems": (["--questions-per-step", 5000], "fewer than the 5000 of a step; add rows"),
    "no such file": (["--dataset", "nowhere.jsonl"], "dataset file nowhere.jsonl does not exist"),
    "no such dataset": (["--dataset", "nobody/nothing"], "dataset nobody/nothing (main, train) did not load"),
    "no such model": (["--model-name", "nobody/nothing"], "nobody/nothing cannot be used; give the hub id"),
    "prompt does not fit": (["--max-new-tokens", 1010], "takes only 1024; lower --max-new-tokens or remove the row"),
}


@pytest.mark.parametrize("case", ARGUMENTS, ids=lambda case: case.replace(" ", "_"))
def test_arguments(case, capsys, monkeypatch, tmp_path):
    arguments, message = ARGUMENTS[case]
    error = stop_message(capsys, monkeypatch, tmp_path, *arguments)
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


DATASETS = {
    "empty": ([], "holds no problems"),
    "blank lines only": (["", "  "], "holds no problems"),
    "not JSON": ([GOOD, "{question: 1}"], "line 2 is not valid JSON"),
    "cut off": ([GOOD, GOOD, '{"question": "a'], "line 3 is not valid JSON"),
    "a list": ([[1, 2]], "line 1 has no 'question'"),
    "no answer column": ([GOOD, {"question": "1?"}], "line 2 has no 'answer'"),
    "null question": ([{"question": None, "answer": "#### 2"}], "line 1 has no 'question'"),
    "empty answer": ([GOOD, "", {"question": "1?", "answer": " "}], "line 3 has no 'answer'"),
    "answer without number": ([{"question": "1?", "answer": "two"}], "line 1: 'answer' ends in 'two'"),
}


@pytest.mark.parametrize("case", DATASETS, ids=lambda case: case.replace(" ", "_"))
def test_datasets(case, capsys, monkeypatch, tmp_path):
    rows, message = DATASETS[case]
    path = write(tmp_path / "data.jsonl", *rows)
    error = stop_message(capsys, monkeypatch, tmp_path, "--dataset", path)
    assert message in error and str(path) in error and error.count("\n") == 1
    assert message in stop_message(capsys, monkeypatch, tmp_path, "--eval-dataset", path)
    assert not (tmp_path / "runs").exists()


def test_a_local_file_gives_up_its_last_tenth(capsys, monkeypatch, tmp_path):
    """Without --eval-dataset 30 rows leave 26; asking for 27 questions a step says so."""
    path = write(tmp_path / "data.jsonl", *[GOOD] * 30)
    error = stop_message(
        capsys, monkeypatch, tmp_path, "--dataset", path, "--eval-dataset", "", "--questions-per-step", 27
    )
    assert "leaves 26 training problems" in error


def test_tokenizer_without_chat_template_or_eos(capsys, monkeypatch, tmp_path):
    for attribute in ("chat_template", "eos_token"):
        folder = tmp_path / attribute
        shutil.copytree(TOY / "model", folder)
        (folder / "chat_template.jinja").unlink() if attribute == "chat_template" else None
        tokenizer = AutoTokenizer.from_pretrained(folder)
        setattr(tokenizer, attribute, None)
        tokenizer.save_pretrained(folder)
        error = stop_message(capsys, monkeypatch, tmp_path, "--model-name", folder)
        assert ("chat_template is not set" if attribute == "chat_template" else "has no EOS token") in error


def test_template_that_refuses_a_system_message(capsys, monkeypatch, tmp_path):
    shutil.copytree(TOY / "model", tmp_path / "model")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    path = tmp_path / "model" / "chat_template.jinja"
    path.write_text(refusal + path.read_text())
    arguments = ["--model-name", tmp_path / "model", "--system-prompt", "Be brief."]
    assert "(no system role)" in stop_message(capsys, monkeypatch, tmp_path, *arguments)


def test_a_folder_that_is_no_run_is_left_alone(capsys, monkeypatch, tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    precious = write(tmp_path / "runs" / "run" / "metrics.jsonl", "precious")
    assert "exists and holds no run" in stop_message(capsys, monkeypatch, tmp_path)
    assert precious.read_text() == "precious\n"


def test_no_vllm_and_no_gpu(capsys, monkeypatch, tmp_path):
    def gpu_build(**_):  # what vllm's GPU build does on a machine without a GPU
        raise RuntimeError("Failed to infer device type")

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=gpu_build))
    message = stop_message(capsys, monkeypatch, tmp_path)
    assert "on a cpu (Failed to infer device type)" in message and "tests/requirements-cpu.txt" in message
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "tests/requirements-cpu.txt" in stop_message(capsys, monkeypatch, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_logits_that_change_after_the_head_are_refused(capsys, tmp_path):
    from grpo_upskill import Args, load_policy

    shutil.copytree(TOY / "model", tmp_path / "model")
    config = json.loads((TOY / "model" / "config.json").read_text()) | {"final_logit_softcapping": 30.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    import torch

    with pytest.raises(SystemExit):
        load_policy(Args(model_name=str(tmp_path / "model")), torch.device("cpu"), torch.float32, 0)
    assert "sets final_logit_softcapping" in capsys.readouterr().err


def test_disagreement_with_the_engine_stops_the_run(tmp_path):
    """A limit below rounding error stands for stale weights: the run stops before it updates."""
    process = training("--output-dir", tmp_path, "--max-logp-diff", 1e-12, "--lora-r", 0)
    output = process.communicate()[0]
    assert process.returncode == 2
    assert "trainer and vLLM differ by" in output and "in step 1, over --max-logp-diff" in output
