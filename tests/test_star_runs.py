"""star_dpo.py as a user runs it, on the toy with options: it learns, resumes exactly and reuses samples."""

import json
import math
import os
import random
import re
import signal
import sys
import time

import pytest
from conftest import ROOT, STAR_RUN, TOY_MC, documented, toy_command, training

from star_dpo import split_ids

NOT_REPEATABLE = ("time/", "charts/tokens_per_second")
MODES = {
    "dpo": [  # everything that changes from iteration to iteration
        "--lora-r", 0, "--no-reset-model", "--reference", "iteration_start", "--rpo-alpha", 1, "--max-pairs", 2,
        "--rationalize", 1, "--samples-per-question", 3, "--seed", 2,
    ],
    "sft": [
        "--strategy", "sft", "--lora-r", 4, "--internal-epochs", 2, "--evaluation", "accuracy", "--dataset",
        "second.csv",
    ],
}  # fmt: skip
WRITTEN = {}  # name of a run: keys of its metrics.jsonl


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder):
    """(weights, metrics, samples) of a finished run, without what a clock decides."""
    metrics = [{k: v for k, v in r.items() if not k.startswith(NOT_REPEATABLE)} for r in records(folder)]
    samples = {path.name: path.read_text() for path in (folder / "samples").iterdir()}
    samples.pop("check.jsonl", None)  # of a start that found all samples, and compares some with its new engine
    return (folder / "final" / "model.safetensors").read_bytes(), metrics, samples


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The toy's questions in MMMLU's layout: the same rows "in another language"."""
    path = tmp_path_factory.mktemp("data") / "second.csv"
    lines = ["Question,A,B,C,D,Answer,Subject"]
    for row in map(json.loads, (TOY_MC / "questions.jsonl").open()):
        assert "," not in row["question"]
        lines.append(",".join([row["question"], *row["choices"], "ABCD"[row["answer"]], row["subject"]]))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def command(mode, second):
    return [*STAR_RUN, *(str(second) if x == "second.csv" else str(x) for x in MODES[mode])]


@pytest.fixture(scope="module")
def reference(mode, command, tmp_path_factory):
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    process = training("--output-dir", folder, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    WRITTEN[mode] = {key for record in records(folder / "run") for key in record}
    return folder / "run"


def test_killed_while_sampling_and_while_training(mode, command, reference, tmp_path):
    """SIGKILL in the middle of the first iteration's samples, then in the middle of an iteration's steps."""
    folder, moment = tmp_path / "run", random.Random()
    steps = sum("losses/loss" in record for record in records(reference))
    for what, most in (("samples", 2), ("steps", steps - 2))[mode == "sft" :]:
        process, target = training("--output-dir", tmp_path, command=command), moment.randint(1, most)
        while True:
            path = folder / ("samples/train_1.jsonl" if what == "samples" else "metrics.jsonl")
            text = path.read_text() if path.exists() else ""
            if (text.count("\n") // 6 if what == "samples" else text.count('"losses/loss"')) >= target:
                break
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if what == "samples":  # and a line that was cut off
            with open(path, "a") as file:
                file.write('{"indices": 1, "sub')
    process = training("--output-dir", tmp_path, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    again = results(folder)
    for a, b in zip(again[1], results(reference)[1], strict=True):
        assert a == b
    assert again == results(reference)


def test_reference_run(mode, reference):
    """What a run says of itself: the first loss, the self-check, splits, what it wrote."""
    rows, split = records(reference), split_ids(3000)
    steps = [r for r in rows if "losses/loss" in r]
    rollouts = [r for r in rows if "rollout/accuracy" in r]
    assert [r["iteration"] for r in rollouts] == [1, 2]
    assert all(r["rollout/logp_diff"] < 1e-6 for r in rollouts)
    if mode == "dpo":
        for iteration in (1, 2):  # policy = reference
            first = next(r for r in steps if r["iteration"] == iteration)
            assert first["losses/loss"] - first["dpo/chosen_nll"] == pytest.approx(0.6931471806, abs=1e-6)
            assert abs(first["dpo/margin"]) < 1e-6 and abs(first["dpo/chosen_reward"]) < 1e-6
        assert rollouts[0]["rollout/rationalized"] > 0
        assert all(r["rollout/units"] <= 2 * 16 for r in rollouts)
    for path in (reference / "samples").iterdir():
        ids = {json.loads(line)["indices"] for line in path.open()}
        assert ids <= set(split["train"][:16] if path.name[0] in "th" else split["val"][:8])
    hinted = reference / "samples" / "hinted_1.jsonl"
    assert mode != "dpo" or all("(CORRECT)" in json.loads(line)["prompted_questions"] for line in hinted.open())


def test_signals(mode, command, reference, tmp_path):
    """SIGUSR1 in an evaluation and between two steps: 128 + 10, no step is lost; wandb has its files."""
    if mode != "dpo":
        pytest.skip("the same text of code as in the other mode")
    wandb = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    process = training("--output-dir", tmp_path, "--track", command=command, env=os.environ | wandb)
    folder = tmp_path / "run"
    while not (folder / "samples" / "val_2.jsonl").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGUSR1 and "these samples are kept" in output, output
    assert (folder / "checkpoints" / "step_000002").exists()
    written = (folder / "metrics.jsonl").read_text().count('"losses/loss"')
    assert written == 2
    process = training("--output-dir", tmp_path, "--track", command=command, env=os.environ | wandb)
    while (folder / "metrics.jsonl").read_text().count('"losses/loss"') == written:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGUSR1 and "--run-name run goes on from there" in output, output
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    process = training("--output-dir", tmp_path, command=command)
    assert process.communicate()[0] and process.returncode == 0
    assert results(folder) == results(reference)


@pytest.mark.parametrize("fault", ["stale weights", "another temperature", "a shifted tree"])
def test_the_self_check_stops(fault, mode, tmp_path):
    """Planted faults end the run before anything is trained on their samples."""
    if mode != "dpo":
        pytest.skip("the same text of code as in the other mode")
    text = (ROOT / "star_dpo.py").read_text()
    line, planted = {
        "stale weights": ("    sync_weights(llm, policy)\n", "    later(path) or sync_weights(llm, policy)\n"),
        "another temperature": ("n=n, temperature=temperature,", "n=n, temperature=temperature * 0.9,"),
        "a shifted tree": ("position_ids=depth,", "position_ids=depth + (depth > 20) * (column % 2),"),
    }[fault]  # fmt: skip
    assert text.count(line) == 1
    text = text.replace(line, planted).replace(
        "def generate(", "def later(path):\n    return path.stem == 'train_2'\n\n\ndef generate("
    )
    (tmp_path / "star_dpo.py").write_text(text)
    (tmp_path / "eval_gsm8k.py").write_text((ROOT / "eval_gsm8k.py").read_text())
    command = [sys.executable, str(tmp_path / "star_dpo.py"), *STAR_RUN[2:]]
    options = ["--evaluation", "none", "--no-reset-model", "--lora-r", 0, "--output-dir", tmp_path]
    process = training(*options, command=command)
    output = process.communicate()[0]
    where = "train_2" if fault == "stale weights" else "train_1"
    assert process.returncode == 1 and f"nats a token in {where}, the limit is 0.0001" in output, output


def test_saved_samples_are_as_good_as_new_ones(mode, command, reference, tmp_path):
    """The same steps on another's samples, however they are split; listwise targets."""
    if mode != "dpo":
        pytest.skip("one set of samples is enough")
    samples = reference / "samples"
    files = ["--num-iterations", 1, "--preload-val", samples / "val_samples.jsonl", "--preload-train"]
    files.append(samples / "train_1.jsonl")
    other = ["--lora-r", 0, "--shuffle", "all", "--samples-per-question", 3, "--strategy"]
    models = ["--ref-model-name", TOY_MC / "model"]
    few = tmp_path / "few.jsonl"  # a question with two samples, others with three
    few.write_text("".join(line for line in (samples / "train_1.jsonl").open().readlines()[:-1]))
    checked = [
        *files,
        "--max-logp-diff",
        1e-12,
        "--evaluation",
        "loss",
        "--rationalize",
        0,
        "--output-dir",
        tmp_path / "checked",
    ]
    process = training(*checked, command=command)
    output = process.communicate()[0]
    assert process.returncode == 1 and "nats a token in check, the limit is 1e-12" in output, output
    assert not any("losses/loss" in record for record in records(tmp_path / "checked" / "run"))
    arms = {
        "preloaded": (command, [*files, "--skip-first-eval", "--max-tokens-per-microbatch", 300]),
        "listwise": (STAR_RUN, [*files, *other, "dpo_listwise", "--evaluation", "loss", *models]),
        "weighted": (
            STAR_RUN,
            [*files[:-1], few, *other, "weighted", "--evaluation", "none", "--lr-schedule", "constant"],
        ),
    }
    steps = {}
    for name, (start, extra) in arms.items():
        process = training(*extra, "--output-dir", tmp_path / name, command=start)
        output = process.communicate()[0]
        assert process.returncode == 0, output
        rows = records(tmp_path / name / "run")
        steps[name] = [r for r in rows if "losses/loss" in r]
        WRITTEN[name] = {key for record in rows for key in record}
        assert "have a text and belong to the questions asked" in output
    first = [r for r in records(reference) if "losses/loss" in r and r["iteration"] == 1]
    for key in ("losses/loss", "losses/grad_norm", "dpo/margin"):  # in other micro-batches, which share other answers
        assert [r[key] for r in steps["preloaded"]] == pytest.approx([r[key] for r in first], rel=1e-3, abs=1e-5), key
    assert steps["listwise"][0]["losses/loss"] == pytest.approx(math.log(3), abs=1e-6)  # policy = reference, K = 3
    assert steps["weighted"][0]["losses/loss"] > 0


def test_a_run_ends_with_its_model_when_nothing_is_left_to_learn(mode, tmp_path):
    """Two easy questions: after some iterations all samples are right, and dpo has no pairs."""
    if mode != "dpo":
        pytest.skip("needs no mode")
    options = ["--num-train-questions", 2, "--evaluation", "none", "--lora-r", 0, "--lr", 3e-3, "--internal-epochs", 8]
    options += ["--no-reset-model", "--num-iterations", 6, "--output-dir", tmp_path]
    process = training(*options, command=STAR_RUN)
    output = process.communicate()[0]
    assert process.returncode == 0 and "training ends here" in output, output
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_prompt_study_and_evaluation_only(mode, tmp_path):
    if mode != "dpo":
        pytest.skip("needs no mode")
    study = ["--meta-prompt", "Think.", "--internal-epochs", 0, "--num-iterations", 1, "--evaluation", "none"]
    process = training(*study, "--samples-per-question", 1, "--output-dir", tmp_path / "study", command=STAR_RUN)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    rows = records(tmp_path / "study" / "run")
    assert 0 <= rows[0]["rollout/accuracy"] <= 1 and not any("losses/loss" in row for row in rows)
    sampled = (tmp_path / "study" / "run" / "samples" / "train_1.jsonl").read_text().splitlines()
    assert len(sampled) == 16 and "Think." in sampled[0]
    WRITTEN["study"] = set(rows[0])
    process = training(
        "--num-iterations",
        0,
        "--eval-split",
        "test",
        "--output-dir",
        tmp_path / "eval",
        "--lora-r",
        0,
        command=STAR_RUN,
    )
    output = process.communicate()[0]
    assert process.returncode == 0, output
    (row,) = records(tmp_path / "eval" / "run")
    assert (
        row["eval/loss"] == pytest.approx(0.6931471806, abs=1e-6) and not (tmp_path / "eval" / "run" / "final").exists()
    )
    assert {r["indices"] for r in map(json.loads, (tmp_path / "eval/run/samples/val_0.jsonl").open())} == set(
        split_ids(3000)["test"][:8]
    )


def test_every_logged_key_stands_in_the_docs():
    """The keys are on the script's page or on the page of what all share; the script's page has no other."""
    if set(WRITTEN) != {*MODES, "preloaded", "listwise", "weighted", "study"}:
        pytest.skip("needs the keys of every run")
    written = set()
    for key in set().union(*WRITTEN.values()) - {"step", "iteration", "meta_prompt"}:
        key = re.sub(r"subject_\w+", "subject_{name}", key)
        written.add(key)
    # rollout/ repeats figures of eval/, and eval/ those of dpo/
    for prefix, of in ("rollout/", "eval/"), ("eval/", "dpo/"):
        written -= {key for key in written if key.startswith(prefix) and key.replace(prefix, of) in written}
    assert documented("star_dpo.md") <= written <= documented("star_dpo.md") | documented("training.md")


# ---- learning --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["sft", "dpo"])
def learned(request, tmp_path_factory):
    """The page's command for the toy, shortened."""
    lr = {"sft": "1e-3", "dpo": "3e-4"}[request.param]
    command = toy_command(
        "docs/star_dpo.md", f"star_dpo.py --strategy {request.param} --lr {lr} --model-name tests/toy_mc"
    )
    folder = tmp_path_factory.mktemp("learned")
    short = ["--num-train-questions", 250, "--eval-size", 150, "--eval-every", 1000]
    short += ["--output-dir", folder, "--run-name", "run"]
    process = training(*short, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return request.param, records(folder / "run")


def test_it_learns(learned):
    strategy, rows = learned
    first, *_, last = [row for row in rows if "eval/accuracy" in row]
    assert last["eval/accuracy"] >= first["eval/accuracy"] + 0.1
    assert max(row.get("rollout/logp_diff", 0.0) for row in rows) < 1e-6
    if strategy == "dpo":  # with the RPO term: right answers of the first pass do not get less likely
        steps = [row for row in rows if "dpo/margin" in row and row["iteration"] == 1]
        late = steps[len(steps) // 2 :]
        assert sum(row["dpo/chosen_reward"] for row in late) / len(late) > -0.02
        assert sum(row["dpo/margin"] for row in late) > 0.05 * len(late)
