"""What a user can get wrong: one sentence that says what, where and what to do; exit code 1; nothing written."""

import json
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, SMALL_RUN, TOY, stop_message, training
from transformers import AutoTokenizer, Qwen3MoeConfig

from grpo_upskill import Args, check_model, load_model, open_run

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
    "infinite": (["--lr", "inf"], "--lr is inf; it must be a finite number"),
    "not a number": (["--kl-coef", "nan"], "--kl-coef is nan"),
    "too few problems": (["--questions-per-step", 5000], "fewer than --questions-per-step; add rows"),
    "no such file": (["--dataset", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
    "no such dataset": (["--dataset", "nobody/nothing"], "dataset nobody/nothing (train) did not load"),
    "no such model": (["--model-name", "nobody/nothing"], "nobody/nothing cannot be used; give the hub id"),
    "prompt does not fit": (["--max-new-tokens", 1010], "the model's 1024; lower --max-new-tokens or remove the row"),
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
    "two numbers": ([{"question": "1?", "answer": "#### 5 or 6"}], "line 1: 'answer' ends in '#### 5 or 6'"),
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
    assert "leaves 26 problems, fewer than --questions-per-step" in error


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
    assert "no system role)" in stop_message(capsys, monkeypatch, tmp_path, *arguments)


def test_a_folder_that_is_no_run_is_left_alone(capsys, monkeypatch, tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    precious = write(tmp_path / "runs" / "run" / "metrics.jsonl", "precious")
    assert "exists and holds no run" in stop_message(capsys, monkeypatch, tmp_path)
    assert precious.read_text() == "precious\n"


def test_no_vllm_and_no_gpu(capsys, monkeypatch, tmp_path):
    def gpu_build(**_):  # what vllm's GPU build does on a machine without a GPU
        raise RuntimeError("Failed to infer device type")

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=gpu_build))
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)
    message = stop_message(capsys, monkeypatch, tmp_path)
    assert "Failed to infer device type" in message and "tests/requirements-cpu.txt" in message
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "tests/requirements-cpu.txt" in stop_message(capsys, monkeypatch, tmp_path, "--run-name", "other")


def changed_model(folder, **config):
    """A copy of the toy whose config.json says something else."""
    shutil.copytree(TOY / "model", folder)
    before = json.loads((TOY / "model" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(before | config))
    return folder


@pytest.mark.parametrize("name, value", [("final_logit_softcapping", 30.0), ("num_experts", 8)])
def test_models_that_are_not_supported(name, value, tmp_path):
    with pytest.raises(SystemExit, match=f"sets {name}: .* not supported"):
        check_model(str(changed_model(tmp_path / "model", **{name: value})))


def test_a_real_mixture_of_experts_is_refused(tmp_path):
    Qwen3MoeConfig(num_experts=4).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="mixtures of experts are not supported"):
        check_model(str(tmp_path))


def test_weights_that_are_missing_damaged_or_incomplete(tmp_path):
    no_weights = changed_model(tmp_path / "none")
    (no_weights / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"holds no \*.safetensors"):
        check_model(str(no_weights))
    damaged = changed_model(tmp_path / "damaged")
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SystemExit, match="the weights of .* cannot be read"):
        load_model(str(damaged), torch.float32)
    incomplete = changed_model(tmp_path / "incomplete", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    with pytest.raises(SystemExit, match=r"lacks weights, \['model.layers.3"):
        load_model(str(incomplete), torch.float32)


def test_no_gpu_driver(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    message = stop_message(capsys, monkeypatch, tmp_path)
    assert "finds no GPU that it can use; nvidia-smi must show a driver for CUDA 13.0 or later" in message
    assert not (tmp_path / "runs").exists()


def test_folders_that_cannot_be_used(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    message = stop_message(capsys, monkeypatch, tmp_path, "--output-dir", tmp_path / "file")
    assert "cannot be used" in message and "choose another --output-dir" in message
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "args.json").write_text('{"lr"')
    assert "cannot be used (Expecting" in stop_message(capsys, monkeypatch, tmp_path)


def test_a_run_is_locked(tmp_path):
    args = Args()
    assert open_run(args, tmp_path / "run") == ""
    script = "import sys, pathlib, grpo_upskill as g; print(g.open_run(g.Args(), pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    assert "error: another process runs" in subprocess.check_output(command, text=True, cwd=ROOT)
    command[-1] = str(tmp_path / "other")
    for _ in range(2):  # a lock ends with its process
        assert subprocess.check_output(command, text=True, cwd=ROOT) == "\n"


def test_wandb_without_a_key(tmp_path):
    """Real wandb, no key and no terminal to ask for one: the run ends before its engine starts."""
    environment = {"WANDB_API_KEY": "", "WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    process = training("--output-dir", tmp_path, "--track", env=environment)
    output = process.communicate()[0]
    assert process.returncode == 1
    assert "error: --track does not work; run `wandb login`, or set WANDB_MODE=offline" in output


def planted(tmp_path, before, after, *arguments):
    """(exit code, output) of a run of the script with one line changed."""
    source = (ROOT / "grpo_upskill.py").read_text()
    assert source.count(before) == 1
    (tmp_path / "grpo_changed.py").write_text(source.replace(before, after))
    command = [SMALL_RUN[0], str(tmp_path / "grpo_changed.py"), *SMALL_RUN[2:]]
    process = training("--output-dir", tmp_path, "--lora-r", 0, *arguments, command=command)
    output = process.communicate()[0]
    return process.returncode, output


def test_a_policy_of_nan_ends_the_run(tmp_path):
    """Also where no reward shows it: all rewards equal, so that nothing is trained in the step that finds it."""
    update, poison = "                optimizer.step()\n", "                trainable[0].data.fill_(math.nan)\n"
    code, output = planted(tmp_path, update, poison, "--alpha-mi", 0)
    assert code == 1 and "error: " in output and "in step 2" in output and "Traceback" not in output, output
    code, output = planted(tmp_path, update, poison, "--run-name", "mi")
    assert code == 1 and "a reward of step 2 is not finite" in output, output
    shown = "rewards = gather(rewards)[0]"
    code, output = planted(tmp_path, shown, "rewards = rewards * math.inf", "--run-name", "inf")
    assert code == 1 and "a reward of step 1 is not finite" in output, output


def test_a_full_disk(tmp_path):
    """Too little room for checkpoints is found before training; a write that fails says so."""
    code, output = planted(tmp_path, "shutil.disk_usage(run_dir).free < size", "0 < size")
    assert code == 1 and "GB, too much for" in output, output
    limit = "__import__('resource').setrlimit(1, ({0}, {0}))\n"  # of the size of a file, as a disk that is full
    save = "        if optimizer.state and (last"
    for size, words in (
        (3000, "jsonl cannot be written; make room"),
        (100_000, "the checkpoint of step 2 cannot be written"),
    ):
        code, output = planted(tmp_path, save, "        " + limit.format(size) + save, "--run-name", size)
        assert code == 1 and words in output, output
    assert not list((tmp_path / "100000" / "checkpoints").glob("step_*"))
