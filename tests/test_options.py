"""Options that no other run uses, in small runs as a user would start them."""

import json
import os
import pty
import shutil
import subprocess
import termios

import pytest
from conftest import SMALL_RUN, TOY, training
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

RUNS = {
    "no skills, no pad token": ["--skill-prefix", "", "--alpha-mi", 0, "--loss-type", "dr_grpo", "--clip-high", 0.3],
    "MI alone, token form": [
        *("--mi-form", "token", "--correct-coef", 0, "--lr-schedule", "constant", "--eval-samples", 2),
        *("--temperature", 0.8, "--eval-temperature", 0, "--max-tokens-per-microbatch", 200),
    ],
    "GPT-NeoX, mean of tokens": ["--mi-form", "token_mean", "--shuffle-rewards", "--is-cap", 1],
}


def make_model(name, folder):
    """The toy; without a pad token; or with random weights of a class that vLLM changes in place (GPT-NeoX)."""
    shutil.copytree(TOY / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if "no pad token" in name:
        tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).pad_token_id is None
    if "no skills" in name:  # transformers refuses to save this, and many hub models have it
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": False, "temperature": 0.6}))
    if "GPT-NeoX" in name:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = GPTNeoXConfig(
            **sizes, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None
        )
        GPTNeoXForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, tmp_path):
    make_model(name, tmp_path / "model")
    arguments = ["--model-name", tmp_path / "model", "--output-dir", tmp_path, "--lora-r", 0, "--num-steps", 2]
    process = training(*RUNS[name], *arguments)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "global_step" in record]
    assert len(steps) == 2 and all(record["losses/grad_norm"] > 0 for record in steps)
    assert all(record["rollout/logp_diff"] < 1e-5 for record in steps)
    assert all(("skill/mi" in record) == ("no skills" not in name) for record in steps)
    assert all(("eval/mi" in record) == ("no skills" not in name) for record in records if "eval/pass@1" in record)
    final = tmp_path / "run" / "final"
    assert (final / "model.safetensors").exists() and AutoTokenizer.from_pretrained(final).chat_template
    assert json.loads((final / "generation_config.json").read_text()).get("temperature") == (
        0.6 if "no skills" in name else None
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * {"no skills": 1, "MI alone,": 8, "GPT-NeoX,": 4}[name[:9]]


def test_a_terminal_shows_the_progress_bar_and_nothing_else(tmp_path):
    """A real process on a terminal: no warning of a library, one line of progress, the table at the end."""
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (40, 160))
    command = [*SMALL_RUN, "--output-dir", str(tmp_path), "--num-steps", "3", "--lora-r", "4"]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_LEVEL")}
    process = subprocess.Popen(command, stdout=end, stderr=end, env=environment)
    os.close(end)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0, shown.decode()
    bar, _, table = shown.decode().partition("before     after")
    lines = [line.strip() for line in bar.replace("\r", "\n").split("\n") if line.strip()]
    assert lines and all(line.split("%|")[0].strip() in ("0", "33", "67", "100") for line in lines), lines
    assert "accuracy" in lines[-1] and "3/3" in lines[-1]
    rest = [line for line in table.splitlines() if line.strip()]
    assert all(line.startswith("eval/") for line in rest[:-1]) and rest[-1].startswith("model: "), rest


def test_own_file_without_evaluation_data(tmp_path):
    """A user's own .jsonl gives up its last tenth; the name of the run is made from script, model, seed and time."""
    rows = (TOY / "train.jsonl").read_text().splitlines(keepends=True)[:40]
    (tmp_path / "mine.jsonl").write_text("".join(rows))
    arguments = ["--dataset", tmp_path / "mine.jsonl", "--eval-dataset", "", "--run-name", "", "--num-steps", 1]
    process = training("--output-dir", tmp_path, *arguments, "--eval-size", 0)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    (folder,) = tmp_path.glob("grpo_upskill__model__1__*")
    asked = {json.loads(line)["question"] for line in (folder / "completions.jsonl").read_text().splitlines()}
    assert asked == {json.loads(row)["question"] for row in rows[35:]}
