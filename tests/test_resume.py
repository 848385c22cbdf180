"""Killed and started again equals never killed: weights, metrics and samples, bit for bit (on the CPU)."""

import json
import random
import re
import shutil
import signal
import time

import pytest
from conftest import MEMORY_RUN, PERPLEXITY_RUN, SMALL_RUN, documented, training

from grpo_upskill import checkpoints

NOT_REPEATABLE = ("time/", "memory/", "charts/samples_per_second", "charts/tokens_per_second")
SIX_STEPS = ["--num-steps", 6, "--eval-every", 2, "--save-every", 2]
FULL = [
    "--lora-r", 0, "--kl-coef", 0.01, "--mixture-kl-coef", 0.1, "--num-minibatches", 2, "--mi-gate",
    "--group-by", "skill", "--loss-type", "grpo", "--shuffle-rewards",
]  # fmt: skip
PERPLEXITY = [*SIX_STEPS, "--kl-coef", 0.01, "--num-minibatches", 2]
MEMORY = [*SIX_STEPS, "--max-keys", 10, "--max-values", 7, "--norm-window", 50, "--knn-k", 2]  # small: something goes
MODES = {
    "full": [*SMALL_RUN, *FULL],
    "lora": [*SMALL_RUN, "--lora-r", 4],
    "perplexity": [*PERPLEXITY_RUN, *PERPLEXITY],
    "memory": [*MEMORY_RUN, *MEMORY],
}
WRITTEN = {}  # mode: keys of its metrics.jsonl


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
    return request.param


@pytest.fixture(scope="module")
def command(mode):
    return list(map(str, MODES[mode]))


@pytest.fixture(scope="module")
def reference(mode, command, tmp_path_factory):
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    process = training("--output-dir", folder, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    WRITTEN[mode] = {key for line in (folder / "run" / "metrics.jsonl").open() for key in json.loads(line)}
    return folder / "run"


def test_killed_at_a_random_moment(mode, command, reference, tmp_path):
    folder, moment = tmp_path / "run", random.Random()
    for _ in range(2 if mode == "full" else 1):
        process = training("--output-dir", tmp_path, command=command)
        wait_for(process, folder, min(5, steps_logged(folder) + moment.randint(1, 3)))
        time.sleep(moment.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = training("--output-dir", tmp_path, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    weights, metrics, samples = results(reference)
    again = results(folder)
    assert again[1] == metrics
    assert again[2] == samples
    assert again[0] == weights


def test_signal_saves_and_wandb_goes_along(mode, command, reference, tmp_path):
    """SIGTERM: the step is finished and saved. Arguments that do not change what is trained may differ afterwards."""
    if mode != "full":
        pytest.skip("the same text of code as in the other modes")
    folder = tmp_path / "run"
    wandb = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    process = training("--output-dir", tmp_path, "--save-every", 1, "--track", command=command, env=wandb)
    wait_for(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    newest = checkpoints(folder / "checkpoints")[-1]
    assert f"stopped after step {int(newest.name[5:])}" in output and "--run-name run" in output
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    (folder / "checkpoints" / "unfinished").mkdir()  # as if it had been killed while saving
    process = training("--output-dir", tmp_path, "--max-tokens-per-microbatch", 16000, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0 and f"goes on after step {int(newest.name[5:])}." in output, output
    assert results(folder) == results(reference)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert len(names) == 2 and names[-1] == "step_000006"  # the last two, and nothing unfinished


def test_damaged_checkpoints_and_logs_end_the_run(mode, command, reference, tmp_path):
    """Nothing is renamed, padded or passed over in silence."""
    if mode != "full":
        pytest.skip("the same text of code as in the other modes")
    shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    log = tmp_path / "run" / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-10])
    process = training("--output-dir", tmp_path, command=command)
    output = process.communicate()[0]
    assert process.returncode == 1 and "metrics.jsonl is shorter than at its checkpoint" in output, output
    assert log.read_bytes() == whole[:-10]
    log.write_bytes(whole)
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-3000])
    process = training("--output-dir", tmp_path, command=command)
    output = process.communicate()[0]
    assert process.returncode == 1 and f"{newest} cannot be read; delete it" in output, output
    shutil.rmtree(newest)  # as it says
    process = training("--output-dir", tmp_path, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0 and results(tmp_path / "run") == results(reference), output


def test_finished_and_changed_runs(mode, command, reference):
    if mode != "full":
        pytest.skip("the same text of code as in the other modes")
    before = {path: path.read_bytes() for path in reference.rglob("*") if path.is_file()}
    process = training("--output-dir", reference.parent, command=command)
    assert "is complete" in process.communicate()[0] and process.returncode == 0
    process = training("--output-dir", reference.parent, "--lr", 2e-3, command=command)
    assert "--lr of" in (output := process.communicate()[0]) and "was 0.001, not 0.002" in output
    assert process.returncode == 1
    assert before == {path: path.read_bytes() for path in reference.rglob("*") if path.is_file()}


def test_every_logged_key_stands_in_the_docs():
    """The keys in the tables of these pages, and the keys that the runs write, are the same."""
    if set(WRITTEN) != set(MODES):
        pytest.skip("needs the keys of every mode's run")
    written = set()
    for key in set().union(*WRITTEN.values()) - {"step", "global_step"}:
        key = re.sub(r"@(?!1(?:_|$))\d+", "@{k}", key).replace("iid_pass@1", "iid_pass@{k}")
        key = re.sub(r"(skill|accuracy)_\d", r"\1_{z}", key)
        key = re.sub(r"^terms/\w+?(_std)?$", r"terms/{name}\1", key)
        written.add(re.sub(r"^memory_bank/(exploit|explore)_", "memory_bank/{kind}_", key))
    pages = "training.md", "grpo_upskill.md", "grpo_perplexity.md", "grpo_knn_memory.md"
    assert written == set().union(*map(documented, pages))
