"""irl_imitation.py as a user runs it, on the toy: it learns, resumes exactly, compares, uses a calculator."""

import json
import math
import random
import re
import signal
import time

import pytest
import torch
from conftest import IRL_RUN, ROOT, TOY, documented, training
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_gsm8k import load_split

CASES = json.loads((ROOT / "tests" / "cases" / "irl_cases.json").read_text())
NOT_REPEATABLE = ("time/", "charts/tokens_per_second")
MODES = {
    "lora": [
        *("--lora-r", 4, "--online-alpha", 0.2, "--lambda-kl", 0.1, "--entropy-coef", 0.01, "--gamma", 0.95),
        *("--mle-steps-before-irl", 1, "--lambda-td", 0.3, "--eval-every", 4, "--save-every", 2),
        "--calculator",
    ],
    "full": [  # demonstrations cut before their end, another template, sampling on the held-out questions
        *("--lora-r", 0, "--lambda-kl", 0.1, "--template", "Q: {question} A:", "--max-new-tokens", 24, "--value-shift"),
        *(0, "--eval-dataset", ""),
    ],
}  # fmt: skip
WRITTEN = {}  # name of a run: keys of its metrics.jsonl


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder):
    """(weights, metrics, rewards) of a finished run, without what a clock decides."""
    metrics = [{k: v for k, v in r.items() if not k.startswith(NOT_REPEATABLE)} for r in records(folder)]
    return (folder / "final" / "model.safetensors").read_bytes(), metrics, (folder / "rewards.jsonl").read_text()


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def command(mode):
    return [*IRL_RUN, *map(str, MODES[mode])]


@pytest.fixture(scope="module")
def reference(mode, command, tmp_path_factory):
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    process = training("--output-dir", folder, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    WRITTEN[mode] = {key for record in records(folder / "run") for key in record}
    return folder / "run"


def test_killed_and_started_again(mode, command, reference, tmp_path):
    """SIGKILL after a random step, or SIGUSR1: the same command ends with the same bits; another one is refused."""
    if mode == "full":
        pytest.skip("less to restore than in the other mode")
    path = tmp_path / "run" / "metrics.jsonl"
    for number in (signal.SIGKILL, signal.SIGUSR1):
        process = training("--output-dir", tmp_path, command=command)
        target = random.randint(1, 3) if number == signal.SIGKILL else 4
        while not path.exists() or path.read_text().count("losses/loss") < target:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.send_signal(number)
        output = process.communicate()[0]
        if number == signal.SIGUSR1:
            assert process.returncode == 128 + number and "--run-name run goes on from there" in output, output
        assert not (tmp_path / "run" / "final").exists()

    process = training("--output-dir", tmp_path, "--gamma", 0.9, command=command)
    output = process.communicate()[0]
    assert process.returncode == 1 and "--gamma of" in output and "was 0.95, not 0.9" in output, output
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    process = training("--output-dir", tmp_path, command=command)
    output = process.communicate()[0]
    assert process.returncode == 1 and "metrics.jsonl is shorter than at its checkpoint" in output, output
    assert path.read_bytes() == whole[:-10]
    path.write_bytes(whole)

    process = training("--output-dir", tmp_path, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    again = results(tmp_path / "run")
    for a, b in zip(again[1], results(reference)[1], strict=True):
        assert a == b
    assert again == results(reference)


# A fault planted in the script by replacing its text: (before, after, arguments, what the run says)
DIFFER = "error: trainer and vLLM differ by"
SYNC = "        if due or (args.online_alpha and step >= args.mle_steps_before_irl):"
UPDATE = "        optimizer.step()\n"
SAVE = "            save_checkpoint(run_dir"
LIMIT = "            __import__('resource').setrlimit(1, (100_000, 100_000))\n"  # of a file's size: a full disk
ONLINE = ["--online-alpha", 0.2]
FAULTS = {
    "never synced after training": (SYNC, "        if False:", [], DIFFER),
    "stale own samples": (SYNC, "        if due:", ONLINE, DIFFER),
    "another temperature": ("sample(llm, prompts, 1, 1.0, args", "sample(llm, prompts, 1, 0.9, args", ONLINE, DIFFER),
    "a policy of NaN": (
        UPDATE,
        UPDATE + "        trainable[0].data.fill_(math.nan)\n",
        [],
        "step 2 is nan; lower --lr",
    ),
    "a full disk": (SAVE, LIMIT + SAVE, [], "the checkpoint of step 3 cannot be written"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_stop_the_run(fault, tmp_path):
    before, after, arguments, words = FAULTS[fault]
    source = (ROOT / "irl_imitation.py").read_text()
    assert source.count(before) == 1
    (tmp_path / "irl_faulty.py").write_text(source.replace(before, after))
    command = [IRL_RUN[0], str(tmp_path / "irl_faulty.py"), *IRL_RUN[2:], "--num-train-epochs", "1"]
    process = training("--output-dir", tmp_path, "--lora-r", 0, *arguments, command=command)
    output = process.communicate()[0]
    assert process.returncode == 1 and words in output and "Traceback" not in output, output
    assert not (tmp_path / "run" / "final").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_what_a_run_says(mode, reference):
    """Schedules, the self-check, and the identity that ties rewards to log-probabilities, from the files alone."""
    rows = records(reference)
    steps, evaluations = ([r for r in rows if key in r] for key in ("losses/loss", "eval/pass@1"))
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in evaluations] == ([0, 4, 6] if mode == "lora" else [0, 6])
    assert all(r["rollout/logp_diff"] < 1e-5 for r in rows if "rollout/logp_diff" in r)
    assert all("rollout/logp_diff" in r for r in evaluations)
    assert steps[0]["losses/kl"] == pytest.approx(0, abs=1e-5) and steps[-1]["losses/kl"] > 1e-5
    # cosine decay after one step of warm-up; past the end the original's rate went up again
    factors = [r["charts/learning_rate"] / 1e-3 for r in steps]
    assert factors == pytest.approx([1.0] + [(1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)], abs=1e-9)
    for case in CASES["helpers"]["cosine_lr_factor"]:
        if case["progress"] <= 1:
            assert case["factor"] == pytest.approx((1 + math.cos(math.pi * case["progress"])) / 2, abs=1e-9)

    first, bonus = steps[0], 0.01 if mode == "lora" else 0.0
    if mode == "lora":
        assert [r["irl/lambda"] for r in steps] == pytest.approx([0, 0.3, 0.3, 0.3, 0.3, 0.3])
        assert ["rollout/logp_diff" in r for r in steps] == [False, *[True] * 5]  # own samples
        assert abs(first["irl/shift"]) > 1 and len({r["irl/shift"] for r in rows}) == 1
    expected = first["losses/mle"] + first["irl/lambda"] * first["losses/td"] + 0.1 * first["losses/kl"]
    assert first["losses/loss"] == pytest.approx(expected - bonus * first["irl/entropy"], abs=1e-5)
    gamma = 0.95 if mode == "lora" else 1.0
    scored = [json.loads(line) for line in (reference / "rewards.jsonl").open()]
    for row in scored:
        assert len(row["rewards"]) == len(row["log_pis"]) == len(row["entropies"]) == len(row["tokens"])
        assert row["sum"] == pytest.approx(sum(row["rewards"]), abs=1e-6)
        if row["terminal"]:
            assert row["tokens"][-1] == 2
            telescoped = sum(gamma**t * x for t, x in enumerate(row["log_pis"])) + row["v0"]
            assert sum(gamma**t * x for t, x in enumerate(row["rewards"])) == pytest.approx(telescoped, abs=1e-4)
    kinds = [row["kind"] for row in scored]
    assert kinds == ["held_out"] * 200 + ["sample"] * 18
    completions = [json.loads(line) for line in (reference / "completions.jsonl").open()]
    assert [row["tokens"] for row in completions] == [row["tokens"] for row in scored[200:]]
    if mode == "full":  # 24 tokens: nearly every demonstration was cut
        cut = [row for row in scored[:200] if not row["terminal"]]
        assert len(cut) > 100 and all(len(row["tokens"]) == 24 for row in cut)


def test_rows_and_validation_loss_by_transformers(mode, reference):
    """Prompts and answers of the report, and the log-probabilities by the saved model and transformers' own loss."""
    if mode == "full":
        pytest.skip("the same code")
    model, tokenizer = (x.from_pretrained(reference / "final") for x in (AutoModelForCausalLM, AutoTokenizer))
    rows = [json.loads(line) for line in (reference / "rewards.jsonl").open()]
    problems = load_split(str(TOY / "test.jsonl"), "test")[:6]
    for row in [row for row in rows if row["kind"] == "sample"]:
        asked = [{"role": "user", "content": problems[row["id"]]["question"]}]
        assert row["prompt"] == tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    answers = {row["answer"] + tokenizer.eos_token for row in load_split(str(TOY / "train.jsonl"), "train")}
    for row in [row for row in rows if row["kind"] == "held_out"]:
        ours = tokenizer.decode(row["tokens"])
        assert any(whole.startswith(ours) and (ours == whole) == row["terminal"] for whole in answers)
    for row in [row for row in rows if row["kind"] in ("held_out", "sample")][190:]:
        ids = torch.tensor([row["prompt"] + row["tokens"]])
        labels = ids.clone()
        labels[0, : len(row["prompt"])] = -100
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss.item()
        assert row["log_pi"] / len(row["tokens"]) == pytest.approx(-loss, abs=1e-4)


def test_evaluation_only_repeats_the_last_one(mode, command, reference, tmp_path):
    """--num-train-epochs 0 on the saved model: the same figures and rewards but for the draws; no model is written."""
    if mode == "lora":
        pytest.skip("the same code")
    shift = records(reference)[-1]["irl/shift"]
    again = ["--model-name", reference / "final", "--num-train-epochs", 0, "--value-shift", shift]
    process = training("--output-dir", tmp_path, *again, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    (row,), last = records(tmp_path / "run"), records(reference)[-1]
    assert not (tmp_path / "run" / "final").exists()
    exact = ["eval/val_mle", "eval/val_td", "eval/val_entropy", "eval/greedy"]
    assert {k: row[k] for k in exact} == pytest.approx({k: last[k] for k in exact}, abs=1e-6)
    ours, theirs = ([json.loads(x) for x in (path / "rewards.jsonl").open()] for path in (tmp_path / "run", reference))
    for a, b in zip(ours[:200], theirs[:200], strict=True):
        assert a["tokens"] == b["tokens"] and a["rewards"] == pytest.approx(b["rewards"], abs=1e-5)


# ---- learning, the calculator, the comparison ------------------------------------------------------------------------
def planted(row):
    """The row with its sums annotated and one too large; every later step goes on from the wrong value."""
    wrong, (steps, final) = {}, row["answer"].split(" That is ")

    def annotate(match):
        a = wrong.get(match[1], match[1])
        value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[match[2]](int(a), int(match[3])) + 1
        wrong[match[4]] = str(value)
        return f"{a} {match[2]} {match[3]} = <<{a}{match[2]}{match[3]}={value}>>{value}"

    steps = re.sub(r"(\d+) ([-+*]) (\d+) = (\d+)", annotate, steps)
    final = re.sub(r"\d+", lambda match: wrong.get(match[0], match[0]), final)
    return {**row, "answer": f"{steps} That is {final}"}


def test_a_calculator_mends_wrong_sums(tmp_path):
    """A model that has learnt to be wrong by one is right where a calculator puts in the values."""
    rows = [planted(json.loads(line)) for line in (TOY / "train.jsonl").read_text().splitlines()[:800]]
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = training(
        *("--output-dir", tmp_path, "--dataset", tmp_path / "wrong.jsonl", "--max-train-rows", 400, "--eval-size", 40),
        *("--num-train-epochs", 6, "--batch-size", 16, "--max-new-tokens", 80, "--calculator", "--eval-every", 1000),
        *("--lora-r", 0, "--warmup-steps", 5, "--lambda-td", 0.02, "--eval-samples", 2, "--lr", 2e-3),
        command=IRL_RUN,
    )
    output = process.communicate()[0]
    assert process.returncode == 0, output
    last = records(tmp_path / "run")[-1]
    assert last["eval/greedy"] < 0.15 and last["eval/calculator"] > last["eval/greedy"] + 0.2


def test_compare(tmp_path):
    """MLE and IRL on 320 demonstrations: both learn, IRL stays more diverse; an arm that cannot start is named."""
    arguments = [
        *("--output-dir", tmp_path, "--lora-r", 0, "--max-train-rows", 320, "--eval-every", 1000),
        *("--num-train-epochs", 5, "--batch-size", 16, "--eval-size", 60, "--seeds", 3, "--arms"),
    ]
    command = [IRL_RUN[0], str(ROOT / "benchmark" / "irl_compare.py"), *IRL_RUN[2:]]
    arms, folder = ["lambda-td=0,save-every=40", "lambda-td=0.2"], tmp_path / "run"
    process = training(*arguments, *arms, command=command)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    table = (folder / "compare.txt").read_text().splitlines()
    assert len(table) == 3 and "+0.0000 [+0.0000, +0.0000]" in table[1] and "nan" in table[1]  # one seed: no error
    assert (folder / "compare.png").stat().st_size > 1000
    mle, irl = (records(folder / f"{arm}__3")[-1] for arm in arms)
    for arm, last, weight in (arms[0], mle, 0.0), (arms[1], irl, 0.2):
        args = json.loads((folder / f"{arm}__3" / "args.json").read_text())
        assert (args["lambda_td"], args["save_every"], args["seed"]) == (weight, 50 if weight else 40, 3)
        assert f"{last['eval/pass@1']:.4f}" in next(line for line in table if arm in line)
    assert min(mle["eval/pass@1"], irl["eval/pass@1"]) > 0.42  # the start: .37
    assert irl["eval/sample_entropy"] > 1.1 * mle["eval/sample_entropy"]
    assert irl["eval/self_bleu"] < mle["eval/self_bleu"] - 0.01
    process = training(*arguments, arms[0], "lambda-td=x", command=command)
    output = process.communicate()[0]
    assert process.returncode == 1 and "is complete, its model is in" in output
    assert "error: lambda-td=x, seed 3 ended with exit code 2" in output


def test_every_logged_key_stands_in_the_docs():
    """The keys are on the script's page or on the page of what all share; the script's page has no other."""
    if set(WRITTEN) < set(MODES):
        pytest.skip("needs the keys of every mode's run")
    written = set()
    for key in set.union(*WRITTEN.values()) - {"step", "global_step"}:
        key = re.sub(r"@(?!1(?:_|$))\d+", "@{k}", key)
        written.add(re.sub(r"^reward/\w+?_(spearman|auroc|best_of)$", r"reward/{score}_\1", key))
    assert documented("irl_imitation.md") <= written <= documented("irl_imitation.md") | documented("training.md")
