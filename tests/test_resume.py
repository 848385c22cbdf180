"""Killed and started again equals never killed: weights, metrics and samples, bit for bit (on the CPU)."""

import json
import os
import random
import re
import signal
import time

import pytest
from conftest import ROOT, training

NOT_REPEATABLE = ("time/", "memory/", "charts/samples_per_second", "charts/tokens_per_second")
EVERY_OPTION = [
    "--kl-coef",
    0.01,
    "--mixture-kl-coef",
    0.1,
    "--num-minibatches",
    2,
    "--update-epochs",
    2,
    "--mask-truncated",
    "--mi-clip",
    1.0,
    "--mi-gate",
    "--alpha-warmup-steps",
    3,
    "--group-by",
    "skill",
    "--loss-type",
    "grpo",
]
MODES = {"full": ["--lora-r", 0, *EVERY_OPTION], "lora": ["--lora-r", 4]}


def results(folder):
    """(weights, metrics, samples) of a finished run, without what a clock decides."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in record.items() if not k.startswith(NOT_REPEATABLE)} for record in records]
    return (folder / "final" / "model.safetensors").read_bytes(), metrics, (folder / "samples.jsonl").read_text()


def steps_logged(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count('"global_step"') if path.exists() else 0


def wait_for(process, folder, steps):
    """Until so many training steps are logged."""
    while steps_logged(folder) < steps:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return MODES[request.param]


@pytest.fixture(scope="module")
def reference(mode, tmp_path_factory):
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    process = training(*mode, "--output-dir", folder)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return folder / "run"


def test_killed_at_a_random_moment(mode, reference, tmp_path):
    folder, moment = tmp_path / "run", random.Random()
    for _ in range(2):
        process = training(*mode, "--output-dir", tmp_path)
        wait_for(process, folder, min(5, steps_logged(folder) + moment.randint(1, 3)))
        time.sleep(moment.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = training(*mode, "--output-dir", tmp_path)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    weights, metrics, samples = results(reference)
    again = results(folder)
    assert again[1] == metrics
    assert again[2] == samples
    assert again[0] == weights


def test_sigterm_saves_and_a_damaged_checkpoint_is_passed_over(mode, reference, tmp_path):
    folder = tmp_path / "run"
    wandb = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    process = training(
        *mode, "--output-dir", tmp_path, "--save-every", 1, "--track", env=os.environ | wandb
    )  # these may differ
    wait_for(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    newest = max((folder / "checkpoints").glob("step_*"))
    assert f"saved after step {int(newest.name[5:])}" in output and "--run-name run" in output
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    damaged = newest / "training.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    process = training(*mode, "--output-dir", tmp_path, "--save-every", 1)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert f"{newest.name} is damaged and passed over" in output
    assert results(folder) == results(reference)
    assert len(list((folder / "checkpoints").iterdir())) == 2  # --keep-last, and nothing unfinished


def test_finished_and_changed_runs(mode, reference):
    before = {path: path.read_bytes() for path in reference.rglob("*") if path.is_file()}
    process = training(*mode, "--output-dir", reference.parent)
    assert "is complete" in process.communicate()[0] and process.returncode == 0
    (reference / "final").rename(reference / "elsewhere")  # as if it had been stopped just before the end
    process = training(*mode, "--output-dir", reference.parent, "--lr", 2e-3)
    assert "--lr was 0.001 and is 0.002" in process.communicate()[0] and process.returncode == 2
    (reference / "elsewhere").rename(reference / "final")
    assert before == {path: path.read_bytes() for path in reference.rglob("*") if path.is_file()}


def test_every_logged_key_stands_in_the_readme(mode, reference):
    """The README's table and the keys that a run with every option writes are the same list."""
    if mode != MODES["full"]:
        pytest.skip("the run with every option writes every key")
    table = (ROOT / "README.md").read_text().split("### Logged metrics")[1].split("\n## ")[0]
    documented = {key.replace("\\|", "|") for key in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)}
    written = set()
    for record in map(json.loads, (reference / "metrics.jsonl").read_text().splitlines()):
        for key in set(record) - {"step", "global_step"}:
            key = re.sub(r"@(?!1(?:_|$))\d+", "@{k}", key)
            written.add(re.sub(r"(skill|accuracy)_\d", r"\1_{z}", key))
    assert written == documented
