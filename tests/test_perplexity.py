"""grpo_perplexity.py: every reward against hand-computable cases, what is scored, and the path from text to reward."""

import json
import math
import pathlib
import time

import pytest
import torch
from conftest import PERPLEXITY_RUN, TOY, stop_message, training

from grpo_perplexity import group_advantages, perplexity_rewards, score, split_reasoning

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
TAGS = "<think>\n{reasoning}\n</think>\n<answer>\n{answer}\n</answer>"


def rewards(kind, probs, base, reasoning_lens=None, group_size=1, alpha=0.5, padding=0):
    """perplexity_rewards of rows of token probabilities, padded by `padding` columns of garbage."""
    lens = torch.tensor([len(row) for row in probs])
    width = int(lens.max()) + padding
    table = lambda rows: torch.tensor([[math.log(p) for p in row] + [-7.7] * (width - len(row)) for row in rows])
    reasoning_lens = torch.full([len(probs)], 100) if reasoning_lens is None else torch.tensor(reasoning_lens)
    return perplexity_rewards(table(probs), table(base), lens, reasoning_lens, group_size, kind, alpha)


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
            advantages[kind] = group_advantages(found[None], "group")[0].tolist()
            assert advantages[kind] == pytest.approx(case["adv_ddof1_eps1e_4"][kind], abs=1e-5)
            unscaled = group_advantages(found[None], "none")[0].tolist()
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
        assert perplexity_rewards(logps, base, lens, reasoning_lens, 2, kind).isfinite().all()


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
    assert split_reasoning(text, TAGS, ("<think>", "</think>", "<answer>", "<|im_end|>")) == REASONINGS[text]


def test_split_reasoning_without_opening_mark():
    assert split_reasoning("1 + 1 = 2.\n#### 2", "{reasoning}\n#### {answer}") == "1 + 1 = 2."
    assert split_reasoning("1 + 1 = 2.", "{reasoning}\n#### {answer}") is None
    assert split_reasoning("#### 2", "{reasoning}\n#### {answer}") is None


STRIPPED = {
    "2 + 2 = 4. The answer is 4.": "2 + 2 = 4.",
    "2 + 2 = 4.\nTherefore, the final answer is: 4": "2 + 2 = 4.",
    "So $1.50 a piece. Answer: 4.5": "So $1.50 a piece.",
    "The answer is not yet known. 2 + 2 = 4.": "The answer is not yet known. 2 + 2 = 4.",  # not the last sentence
    "They answered 4 times.": "They answered 4 times.",
    "The answer is 4.": None,
}


@pytest.mark.parametrize("text", STRIPPED)
def test_strip_final(text):
    assert split_reasoning(f"<think>{text}</think>", TAGS, (), strip_final=True) == STRIPPED[text]
    assert split_reasoning(f"<think>{text}</think>", TAGS) == text


@pytest.mark.parametrize("text", ["a " * 20_000, "answer is " * 5_000, "1." * 20_000, "<think>" * 5_000, "?" * 20_000])
def test_hostile_texts_do_not_hang(text):
    started = time.perf_counter()
    split_reasoning(f"<think>{text}</think>", TAGS, ("<think>", "</think>", "<answer>"), strip_final=True)
    split_reasoning(text, TAGS, ("<think>",), strip_final=True)
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


def test_score_of_a_bigram_model_is_the_tables():
    torch.manual_seed(0)
    table = torch.rand(9, 9).softmax(-1)
    contexts, targets = [[1, 2, 3], [4], [5, 6]], [[7, 8], [1], [2, 3, 4, 5]]
    found = score(Bigram(table), contexts, targets, 1.0, pad_id=0, max_tokens=100, head_chunk=2)
    for context, target, row in zip(contexts, targets, found):
        expected = [table[a, b].log().item() for a, b in zip([context[-1], *target], target)]
        assert row.tolist() == pytest.approx(expected + [0.0] * (4 - len(target)), abs=1e-6)
    one_by_one = [score(Bigram(table), [c], [t], 1.0, 0, 100, 2)[0] for c, t in zip(contexts, targets)]
    assert all(torch.equal(row[: len(one)], one) for row, one in zip(found, one_by_one))


# ---- runs, as a user starts them -------------------------------------------------------------------------------------
def run(folder, *arguments):
    process = training("--output-dir", folder, *arguments, command=PERPLEXITY_RUN)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    return records, samples


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_run_pays_what_the_frozen_model_says(lora_r, tmp_path):
    """Rewards of both steps recomputed with transformers alone from samples.jsonl; the judge never moves."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records, samples = run(
        tmp_path, "--kl-coef", 0.01, "--num-minibatches", 2, "--lora-r", lora_r, "--lr", 1e-2 if lora_r else 1e-3
    )
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")

    def mean_logp(sample, reasoning):
        chat = [{"role": "user", "content": sample["question"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + reasoning + "\n#### "
        context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        target = tokenizer(sample["gold"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(torch.tensor([context + target])).logits[0].log_softmax(-1)
        return sum(logps[len(context) + i - 1, t].item() for i, t in enumerate(target)) / len(target)

    assert len(samples) == 12 and any(sample["reasoning"] for sample in samples)
    for sample in samples:
        expected = 0.0
        if sample["reasoning"]:
            mean, base = mean_logp(sample, sample["reasoning"]), mean_logp(sample, "")
            expected = 0.5 * math.exp(mean) + 0.5 * max(0, 1 - math.exp(base - mean))
            assert sample["reasoning"] in sample["completion"] and "####" not in sample["reasoning"]
        assert sample["reward"] == pytest.approx(expected, abs=1e-5)
    steps = [record for record in records if "global_step" in record]
    assert all(record["rollout/logp_diff_max"] < 1e-4 and record["losses/grad_norm"] > 0 for record in steps)


LINES = ["--template", "{reasoning}\n####\n{answer}"]  # solutions would merge with a space


@pytest.mark.parametrize(
    "arguments",
    [
        ["--reward-type", "accuracy", "--lora-r", 4, "--min-group-std", 0],
        ["--reward-type", "nover", "--reward-model", "model", "--target", "solution_answer", "--strip-final", *LINES],
        ["--reward-type", "logprob_sum", "--kl-coef", 0.1, "--target", "solution", "--shuffle-rewards", *LINES],
    ],
    ids=["accuracy", "another judge", "solution"],
)
def test_options(arguments, tmp_path):
    """Another judge: one that knows nothing has the perplexity of its vocabulary."""
    if "model" in arguments:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        judge = AutoModelForCausalLM.from_pretrained(TOY / "model")
        torch.nn.init.normal_(judge.lm_head.weight, std=1e-4)  # knows nothing: every token has the same probability
        judge.save_pretrained(tmp_path / "judge")
        AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "judge")
        arguments = [tmp_path / "judge" if argument == "model" else argument for argument in arguments]
    records, samples = run(tmp_path, *arguments)
    before = records[0]
    assert all(record["rollout/logp_diff_max"] < 1e-4 for record in records if "global_step" in record)
    if "accuracy" in arguments:
        assert all(sample["reward"] == sample["correct"] for sample in samples)
        assert not any("perplexity/ppl" in record for record in records)
    if "nover" in arguments:
        assert before["perplexity/eval_ppl"] == pytest.approx(judge.config.vocab_size, rel=0.02)
        shares = {round(i / n, 5) for n in range(1, 7) for i in range(n + 1)}
        assert {round(sample["reward"], 5) for sample in samples} <= shares


def test_a_policy_that_writes_no_reasoning_stops_before_training(tmp_path):
    """The toy writes no <think>; a run with the default template would have nothing to learn from."""
    process = training(
        "--output-dir", tmp_path, "--template", "<think>{reasoning}</think>{answer}", command=PERPLEXITY_RUN
    )
    output = process.communicate()[0]
    assert process.returncode == 2 and "no completion holds a reasoning in the marks of --template" in output


ERRORS = {
    "no reasoning": (["--template", "{answer}"], "must hold {reasoning}"),
    "no mark between": (["--template", "{reasoning} {answer}"], "must hold {reasoning}"),
    "wrong order": (["--template", "{answer} so {reasoning}"], "must hold {reasoning}"),
    "alpha over 1": (["--hybrid-alpha", 1.5], "--hybrid-alpha is 1.5; it must be between 0 and 1"),
    "merged tokens": (["--target", "solution"], "merges with it; put {answer} on a line of its own"),
    "no such judge": (["--reward-model", "nobody/nothing"], "nobody/nothing cannot be used"),
    "group of one": (["--group-size", 1], "--group-size 1 must be at least 2"),
    "no solution": (["--target", "solution"], "has no solution before its ####"),
    "does not fit": (["--max-new-tokens", 1020], "takes only 1024; lower --max-new-tokens"),
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
