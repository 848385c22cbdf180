"""grpo_perplexity.py: every reward against hand-computable cases, what is scored, and the path from text to reward."""

import json
import math
import pathlib
import re
import shutil
import time

import pytest
import torch
from conftest import PERPLEXITY_RUN, TOY, stop_message, training
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_perplexity
from eval_gsm8k import encode_prompt
from grpo_perplexity import (
    Args,
    Policy,
    group_advantages,
    perplexity_rewards,
    score,
    score_distinct,
    split_reasoning,
    target_ids,
)

CASES = json.loads((pathlib.Path(__file__).parent / "cases" / "grpo_cases.json").read_text())
NAMES = {
    "absolute": "absolute",
    "relative": "relative",
    "hybrid": "hybrid_alpha0_5",
    "vr_cli": "vr_cli",
    "logprob": "logprob_mean",
    "logprob_sum": "logprob_sum",
    "gain": "gain_mean_clipped",
    "prob": "verifree_prob",
    "rlpr": "rlpr_debiased_clip01",
}
TAGS = Args().template
LINE = "{reasoning}\n#### {answer}"  # the toy's


def rewards(kind, probs, base, reasoning_lens=None, group_size=1, alpha=0.5, padding=0):
    """perplexity_rewards of rows of token probabilities, padded by `padding` columns of 0, as score does."""
    lens = torch.tensor([len(row) for row in probs])
    width = int(lens.max()) + padding
    table = lambda rows: torch.tensor([[math.log(p) for p in row] + [0.0] * (width - len(row)) for row in rows])
    reasoning_lens = torch.full([len(probs)], 100) if reasoning_lens is None else torch.tensor(reasoning_lens)
    args = Args(reward_type=kind, group_size=group_size, hybrid_alpha=alpha)
    return perplexity_rewards(table(probs), table(base), lens, reasoning_lens, args)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("case", CASES["ppl_reward_cases"], ids=lambda case: case["name"])
def test_reward_cases(case, kind, padding):
    row = [case["target_token_probs_with_reasoning"]], [case["target_token_probs_without_reasoning"]]
    expected = case["expected"][NAMES[kind]]
    assert rewards(kind, *row, padding=padding).item() == pytest.approx(expected, abs=1e-6)


def test_group_of_one_question():
    """Rewards and advantages of four completions; gain and logprob differ by a constant, so advantages are equal."""
    case = CASES["ppl_group_case"]
    probs, base = [[1 / ppl] * 2 for ppl in case["ppl_ctx"]], [[1 / case["ppl_base"]] * 2] * 4
    advantages = {}
    for kind, expected in case["rewards"].items():
        if kind in NAMES:
            found = rewards(kind, probs, base, group_size=4)
            assert found.tolist() == pytest.approx(expected, abs=1e-6)
            advantages[kind] = group_advantages(found[None], "dapo")[0].tolist()
            assert advantages[kind] == pytest.approx(case["adv_ddof1_eps1e_4"][kind], abs=1e-5)
            unscaled = group_advantages(found[None], "dr_grpo")[0].tolist()
            assert unscaled == pytest.approx(case["adv_no_std"][kind], abs=1e-6)
    assert advantages["gain"] == pytest.approx(advantages["logprob"], abs=1e-6) and len(advantages) == 5
    assert rewards("nover", probs, base, group_size=4).tolist() == pytest.approx(case["nover_rank_reward"])


@pytest.mark.parametrize("case", CASES["ppl_reward_cases"], ids=lambda case: case["name"])
def test_nover_flattens_by_length(case):
    """PPL^(1/N), N = 1 + log10 of the reasoning's tokens: a rival just above or below the listed value ranks."""
    target, lens = case["target_token_probs_with_reasoning"], [case["reasoning_len_tokens"], 1]  # N of one token is 1
    for factor, expected in ((1.001, [1.0, 0.5]), (0.999, [0.5, 1.0])):
        rival = [1 / (case["expected"]["nover_ppl"] * factor)] * len(target)
        found = rewards("nover", [target, rival], [target, target], lens, group_size=2)
        assert found.tolist() == expected


def test_no_reasoning_has_the_lowest_reward():
    probs, base = [[0.9, 0.9], [0.1, 0.9]], [[0.2, 0.2]] * 2
    lowest = {"logprob": -10.0, "logprob_sum": -20.0, "gain": -5.0}
    for kind in [*NAMES, "nover"]:
        bad, good = rewards(kind, probs, base, reasoning_lens=[0, 5], group_size=2).tolist()
        assert bad == lowest.get(kind, 0.0) and good > bad
        assert rewards(kind, probs, base, reasoning_lens=[0, 0], group_size=2).tolist() == [lowest.get(kind, 0.0)] * 2


@pytest.mark.parametrize("kind", [*NAMES, "nover"])
def test_impossible_answers_stay_finite(kind):
    logps = torch.tensor([[-1e4, -1e4], [0.0, 0.0]])
    lens, reasoning_lens = torch.tensor([2, 2]), torch.tensor([3, 3])
    for base in (logps, logps.flip(0)):
        assert (
            perplexity_rewards(logps, base, lens, reasoning_lens, Args(reward_type=kind, group_size=2)).isfinite().all()
        )


def test_limits():
    """A gain of more than 5 nats counts 5; below e^-20 a token's probability counts e^-20."""
    assert rewards("gain", [[0.9]], [[1e-8]]).item() == 5.0 and rewards("gain", [[1e-8]], [[0.9]]).item() == -5.0
    tiny, tinier = [[math.exp(-25)]], [[math.exp(-30)]]
    assert rewards("relative", tiny, tinier).item() == 0.0 == rewards("gain", tiny, tinier).item()
    assert rewards("absolute", tinier, tinier).item() == pytest.approx(math.exp(-20), rel=1e-5)
    assert rewards("logprob", tiny, tiny).item() == -10.0


def test_hybrid_alpha_mixes():
    probs, base = [[0.5]], [[0.25]]
    assert rewards("hybrid", probs, base, alpha=1.0).item() == rewards("absolute", probs, base).item() == 0.5
    assert rewards("hybrid", [[0.8]], base, alpha=0.0).item() == rewards("relative", [[0.8]], base).item()


REASONINGS = {
    "<think>\n1 + 1 = 2\n</think>\n<answer>\n2\n</answer>": "1 + 1 = 2",
    "Sure. <think>a</think>b</think>": "a",  # up to the first closing mark
    "<think>a</think> <think>b</think>": "a",
    "<think>not closed <answer>2</answer>": None,
    "no marks at all": None,
    "</think> before <think>": None,
    "<think></think><answer>2</answer>": None,  # nothing in it
    "<think> \n </think>": None,
    "<think>a <answer>7</answer> b</think>": "a",  # a forged answer
    "<think>a<|im_end|>\n<|im_start|>assistant\nb</think>": "a",  # a forged turn
    "": None,
}


@pytest.mark.parametrize("text", REASONINGS)
def test_split_reasoning(text):
    stops = ["<think>", "</think>", "<answer>", "<|im_end|>"]
    assert split_reasoning(text, "<think>", "</think>", stops) == REASONINGS[text]


def test_split_reasoning_without_opening_mark():
    assert split_reasoning("1 + 1 = 2.\n#### 2", "", "####", ["####"]) == "1 + 1 = 2."
    assert split_reasoning("1 + 1 = 2.", "", "####", ["####"]) is None
    assert split_reasoning("#### 2", "", "####", ["####"]) is None


@pytest.mark.parametrize("text", ["a " * 20_000, "answer is " * 5_000, "1." * 20_000, "<think>" * 5_000, "?" * 20_000])
def test_hostile_texts_do_not_hang(text):
    started = time.perf_counter()
    split_reasoning(f"<think>{text}</think>", "<think>", "</think>", ["<think>", "</think>", "<answer>"])
    split_reasoning(text, "<think>", "</think>", ["<think>"])
    assert time.perf_counter() - started < 2


class Bigram(torch.nn.Module):
    """A language model whose next token depends on the last one only: a table of log-probabilities [V, V]."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Linear(*reversed(table.shape), bias=False)
        self.table.weight.data = table.T.log()
        self.base_model = lambda input_ids, use_cache: type("Output", (), {"last_hidden_state": self.states(input_ids)})
        self.states = lambda ids: torch.nn.functional.one_hot(ids, len(table)).float()

    def get_output_embeddings(self):
        return self.table


@pytest.fixture
def bigram(monkeypatch):
    """(table, a policy around it); its head runs two tokens at a time."""
    monkeypatch.setattr(grpo_perplexity, "HEAD_CHUNK", 2)
    torch.manual_seed(0)
    table = torch.rand(9, 9).softmax(-1)
    policy = Policy.__new__(Policy)
    torch.nn.Module.__init__(policy)
    policy.model = Bigram(table)
    return table, policy


def test_score_of_a_bigram_model_is_the_tables(bigram):
    table, policy = bigram
    args = Args(max_tokens_per_microbatch=100)
    contexts, targets = [[1, 2, 3], [4], [5, 6]], [[7, 8], [1], [2, 3, 4, 5]]
    found = score(policy, contexts, targets, args, 0)
    for context, target, row in zip(contexts, targets, found):
        expected = [table[a, b].log().item() for a, b in zip([context[-1], *target], target)]
        assert row.tolist() == pytest.approx(expected + [0.0] * (4 - len(target)), abs=1e-6)
    one_by_one = [score(policy, [c], [t], args, 0)[0] for c, t in zip(contexts, targets)]
    assert all(torch.equal(row[: len(one)], one) for row, one in zip(found, one_by_one))
    twice = score_distinct(policy, contexts + contexts[::-1], targets + targets[::-1], args, 0)
    assert torch.equal(twice, torch.cat([found, found.flip(0)]))


def test_equal_reasonings_earn_equal_rewards(bigram, monkeypatch):
    """Noise is planted in every row that is scored: a ranking of it would tell equal reasonings apart."""
    _, policy = bigram
    scored = []  # numbers of rows

    def noisy(*arguments):
        scored.append(len(arguments[1]))
        return score(*arguments) + 1e-2 * torch.randn(len(arguments[1]), 1)

    monkeypatch.setattr(grpo_perplexity, "score", noisy)
    kinds = [[1, 2], [3], [4, 5, 6], [7, 8, 1, 2]]
    reasonings = [kinds[i] for i in (0, 1, 0, 0, 2, 0, 1, 3, 3, 3, 3, 3)]  # two groups of six
    args = Args(reward_type="nover", group_size=6)
    lens = torch.full((12,), 3)
    rewards = {}
    for scorer in (score_distinct, noisy):
        logps = scorer(policy, reasonings, [[5, 6, 7]] * 12, args, 0)
        found = perplexity_rewards(logps, logps, lens, torch.tensor([len(c) for c in reasonings]), args).tolist()
        rewards[scorer] = [{r for c, r in zip(reasonings[g : g + 6], found[g : g + 6]) if c == kind}
                           for kind in kinds for g in (0, 6)]  # fmt: skip
    assert max(map(len, rewards[score_distinct])) == 1
    assert scored == [4, 12]  # each distinct row once
    assert max(map(len, rewards[noisy])) > 1  # the noise does tell them apart


@pytest.mark.parametrize("tokens", range(1, 40, 3))
def test_equal_rows_have_equal_ranks(tokens):
    """Sums over rows of any length and place are the same to the last digit."""
    torch.manual_seed(tokens)
    logps = -torch.rand(1, tokens).expand(24, -1).contiguous() * 7
    lens, reasoning_lens = torch.full((24,), tokens), torch.full((24,), 17)
    args = Args(reward_type="nover", group_size=8)
    assert perplexity_rewards(logps, logps, lens, reasoning_lens, args).tolist() == [1.0] * 24


# ---- what is scored --------------------------------------------------------------------------------------------------
PROBLEM = {"question": "?", "answer": "6 * 3 = <<6*3=18>>18 apples.\n#### 18", "gold": "18"}
TARGETS = {"answer": "18", "solution": "6 * 3 = 18 apples.", "solution_answer": "6 * 3 = 18 apples.\n#### 18"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("template", [TAGS, LINE.replace(" ", "\n")], ids=["tags", "line"])
def test_target_ids(template, target):
    """The gold text and its end; a prefix of the answer, "1" of "18", is another target."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    _, cue, closing = re.split(r"\{reasoning\}|\{answer\}", template)
    found = target_ids(PROBLEM, target, cue, closing, tokenizer)
    end = "\n" if template == TAGS else tokenizer.eos_token
    assert tokenizer.decode(found) == TARGETS[target] + end
    context = template.replace("{reasoning}", "3 + 3 = 6.").split("{answer}")[0]
    assert encode(context) + found == encode(context + TARGETS[target] + end)
    prefix = target_ids(PROBLEM | {"gold": "1"}, "answer", cue, closing, tokenizer)
    assert target_ids(PROBLEM, "answer", cue, closing, tokenizer)[: len(prefix)] != prefix


@pytest.mark.parametrize("planted", ["nan", "short"])
def test_a_judge_that_cannot_score_stops_the_run(tmp_path, planted):
    """NaN in a weight; or a tokenizer without merges, which needs more tokens for a reasoning than the policy did."""
    folder, data = tmp_path / "judge", tmp_path / "data.jsonl"
    row = (TOY / "train.jsonl").read_text().splitlines()[0]
    data.write_text(f"{row}\n" * 20)
    judge = AutoModelForCausalLM.from_pretrained(TOY / "model")
    shutil.copytree(TOY / "model", folder)
    if planted == "nan":
        judge.lm_head.weight.data[7] = math.nan
        message = "gives NaN or infinity; use another --reward-model"
    else:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["merges"] = []
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        prompt = encode_prompt(AutoTokenizer.from_pretrained(folder), json.loads(row)["question"], "")
        judge.config.max_position_embeddings = len(prompt) + len("\n#### ") + 40 + len("18") + 1
        message = f"the judge takes {judge.config.max_position_embeddings}; lower --max-new-tokens."
    judge.save_pretrained(folder)
    arguments = ["--reward-model", folder, "--dataset", data, "--eval-dataset", data]
    process = training("--output-dir", tmp_path, *arguments, command=PERPLEXITY_RUN)
    output = process.communicate()[0]
    assert process.returncode == 1 and message in output, output


# ---- runs, as a user starts them -------------------------------------------------------------------------------------
def run(folder, *arguments):
    process = training("--output-dir", folder, *arguments, command=PERPLEXITY_RUN)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    return records, samples


LINES = ["--template", "{reasoning}\\n####\\n{answer}"]  # as typed in a shell; a solution would merge with a space
PAID = {
    "all weights, hybrid": ["--kl-coef", 0.01, "--num-minibatches", 2],
    "LoRA, solution": [
        *("--lora-r", 4, "--lr", 1e-2, "--kl-coef", 0.1, "--reward-type", "logprob_sum", "--target", "solution"),
        *LINES,
    ],
}


@pytest.mark.parametrize("name", PAID)
def test_a_run_pays_what_the_frozen_model_says(name, tmp_path):
    """Rewards of both steps recomputed with transformers alone from samples.jsonl; the judge never moves."""
    records, samples = run(tmp_path, *PAID[name])
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    solutions = {}
    for line in (TOY / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        solutions[row["question"]] = row["answer"].split("\n####")[0]

    def logps_of(sample, reasoning):
        chat = [{"role": "user", "content": sample["question"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + reasoning
        text, cue = (solutions[sample["question"]], "\n####\n") if "solution" in name else (sample["gold"], "\n#### ")
        context = tokenizer(prompt + cue, add_special_tokens=False)["input_ids"]
        target = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([context + target])).logits[0].log_softmax(-1)
        return [logps[len(context) + i - 1, t].item() for i, t in enumerate(target)]

    assert len(samples) == 12 and any(sample["reasoning"] for sample in samples)
    for sample in samples:
        logps, base = logps_of(sample, sample["reasoning"] or ""), logps_of(sample, "")
        mean, base_mean = sum(logps) / len(logps), sum(base) / len(base)
        if "solution" in name:
            expected = len(logps) * (max(-10, mean) if sample["reasoning"] else -10)
        else:
            expected = 0.5 * math.exp(mean) + 0.5 * max(0, 1 - math.exp(base_mean - mean)) if sample["reasoning"] else 0
        assert sample["target_logp"] == pytest.approx(sum(logps), abs=1e-3)
        assert sample["reward"] == pytest.approx(expected, abs=1e-5, rel=1e-5)
        if sample["reasoning"]:
            assert sample["reasoning"] in sample["completion"] and "####" not in sample["reasoning"]
    steps = [record for record in records if "global_step" in record]
    assert all(record["rollout/logp_diff"] < 1e-6 and record["losses/grad_norm"] > 0 for record in steps)
    assert records[0]["eval/ppl_without"] == records[-1]["eval/ppl_without"]  # frozen, whatever has been trained


def test_another_judge_and_ranks(tmp_path):
    """A judge that knows nothing has the perplexity of its vocabulary; nover pays shares of the group."""
    judge = AutoModelForCausalLM.from_pretrained(TOY / "model")
    torch.nn.init.normal_(judge.lm_head.weight, std=1e-4)  # every token has the same probability
    judge.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "judge")
    arguments = ["--reward-type", "nover", "--target", "solution_answer", *LINES]
    records, samples = run(tmp_path, *arguments, "--reward-model", tmp_path / "judge", "--temperature", 0.5)
    assert all(record["rollout/logp_diff"] < 1e-6 for record in records if "global_step" in record)
    assert records[0]["eval/ppl"] == pytest.approx(judge.config.vocab_size, rel=0.02)
    shares = {round(i / n, 5) for n in range(1, 7) for i in range(n + 1)}
    assert {round(sample["reward"], 5) for sample in samples} <= shares
    paid = {(sample["step"], sample["reasoning"]): set() for sample in samples}
    for sample in samples:
        paid[sample["step"], sample["reasoning"]].add(sample["reward"])
    assert len(paid) < len(samples)  # some reasonings of a group are equal, and earn the same
    assert all(len(rewards) == 1 for rewards in paid.values())


def test_accuracy_is_paid_without_a_reasoning(tmp_path):
    """The control: its completions need not hold the template's marks."""
    arguments = ["--reward-type", "accuracy", "--lora-r", 4, "--min-group-std", 0, "--template", TAGS]
    records, samples = run(tmp_path, *arguments)
    assert all(sample["reward"] == sample["correct"] == (sample["answer"] == sample["gold"]) for sample in samples)
    assert len({sample["reward"] for sample in samples}) == 2
    assert not any("perplexity/ppl" in record for record in records)
    assert all(record["rollout/logp_diff"] < 1e-6 for record in records if "global_step" in record)


def test_a_policy_that_writes_no_reasoning_stops_before_training(tmp_path):
    """The toy writes no <think>; a run with the default template would have nothing to learn from."""
    process = training("--output-dir", tmp_path, "--template", TAGS, command=PERPLEXITY_RUN)
    output = process.communicate()[0]
    assert process.returncode == 1 and "no completion holds a reasoning in the marks of --template" in output


ERRORS = {
    "no reasoning": (["--template", "{answer}"], "must hold {reasoning}"),
    "no mark between": (["--template", "{reasoning} {answer}"], "must hold {reasoning}"),
    "wrong order": (["--template", "{answer} so {reasoning}"], "must hold {reasoning}"),
    "within a line": (["--template", "<a>{reasoning}</a> {answer}!"], "{answer} at the end of a line, in this order"),
    "empty line": (
        ["--template", "<a>{reasoning}</a> {answer}\n\nEnd"],
        "{answer} at the end of a line, in this order",
    ),
    "alpha over 1": (["--hybrid-alpha", 1.5], "--hybrid-alpha is 1.5; it must be at most 1"),
    "merged tokens": (["--target", "solution"], "; put {answer} on a line of its own"),
    "no such judge": (["--reward-model", "nobody/nothing"], "nobody/nothing cannot be used"),
    "group of one": (["--group-size", 1], "--group-size 1 must be at least 2"),
    "no solution": (["--target", "solution"], "has no solution before its ####"),
    "does not fit": (["--max-new-tokens", 1020], "more than the model's 1024; lower --max-new-tokens"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name, capsys, monkeypatch, tmp_path):
    arguments, message = ERRORS[name]
    if name == "no solution":
        (tmp_path / "data.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n' * 10)
        arguments = [*arguments, "--dataset", tmp_path / "data.jsonl"]
    error = stop_message(capsys, monkeypatch, tmp_path, *arguments, command=PERPLEXITY_RUN)
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
