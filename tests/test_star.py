"""star_dpo.py: losses against hand-computable cases and TRL's own, pairs, masks, data, grading, user errors."""

import csv
import json
import math
import os
import pathlib
import random
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, STAR_RUN, TOY_MC, stop_message
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_gsm8k import encode_prompt
from star_dpo import (
    LABELS,
    LEAK,
    Args,
    TreePolicy,
    build_tree,
    build_trees,
    check_attention,
    choice_figures,
    dpo_loss,
    extract_letter,
    load_questions,
    load_rows,
    load_samples,
    lr_multiplier,
    make_units,
    pad_trees,
    run_units,
    score_trees,
    split_ids,
    target_loss,
    user_message,
)

CASES = json.loads((pathlib.Path(__file__).parent / "cases" / "dpo_cases.json").read_text())
DATA = ROOT.parent / "shared" / "data"
MMLU = pathlib.Path(os.environ.get("MMLU_DIR", DATA / "mmlu")) / "mmlu_test.jsonl"
QWEN = pathlib.Path(os.environ.get("QWEN_TOKENIZER_DIR", DATA / "tokenizer_qwen2.5"))


def double(*values):
    return torch.tensor(values, dtype=torch.double)


def stacked(case, who):
    return torch.stack([double(*case[f"{who}_{side}_logps"]) for side in ("chosen", "rejected")], dim=1)  # [P, 2]


# ---- losses ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_dpo_cases(case):
    logps, expected = stacked(case, "policy").requires_grad_(), case["expected"]
    losses, stats = dpo_loss(logps, stacked(case, "ref"), torch.ones_like(logps), case["beta"], 0.0, 0.0)
    losses.mean().backward()
    assert losses.tolist() == pytest.approx(expected["per_example_loss"], abs=1e-9)
    assert losses.mean().item() == pytest.approx(expected["loss"], abs=1e-9)
    for side, name in enumerate(("chosen", "rejected")):
        assert stats[f"{name}_reward"].tolist() == pytest.approx(expected[f"{name}_rewards"], abs=1e-9)
        assert logps.grad[:, side].tolist() == pytest.approx(expected[f"dloss_dpolicy_{name}_logps"], abs=1e-9)
    assert stats["margin"].tolist() == pytest.approx(expected["reward_margins"], abs=1e-9)
    assert stats["ranking_accuracy"].mean().item() == expected["ranking_accuracy"]


def test_label_smoothing():
    for case in CASES["label_smoothing_extra"]:
        logps, ref = stacked(case, "policy"), stacked(case, "ref")
        losses, _ = dpo_loss(logps, ref, torch.ones_like(ref), case["beta"], case["label_smoothing"], 0.0)
        assert losses.mean().item() == pytest.approx(case["expected_loss"], abs=1e-9)


@pytest.mark.parametrize("case", CASES["rpo_cases"], ids=lambda case: case["name"])
def test_rpo_cases(case):
    logps, ref, expected = stacked(case, "policy"), stacked(case, "ref"), case["expected"]
    lengths = torch.stack([double(*case["chosen_num_tokens"]), double(*[99] * len(logps))], dim=1)
    losses, stats = dpo_loss(logps, ref, lengths, case["beta"], 0.0, case["rpo_alpha"])
    assert losses.mean().item() == pytest.approx(expected["loss_irpo_sequence_mean"], abs=1e-9)
    assert stats["chosen_nll"].tolist() == pytest.approx(expected["nll_per_example"], abs=1e-9)


def test_token_level_case():
    """Logits to sequence log-probabilities: shifted by one, no prompt, no padding; then the loss."""
    case = CASES["token_level_case"]
    logits, expected = torch.tensor(case["logits"]), case["expected"]
    sequences = []
    for ids, labels in zip(case["input_ids"], case["labels"]):
        prompt = [token for token, label in zip(ids[:2], labels) if label == -100]
        sequences.append((prompt, [token for token, label in zip(ids, labels) if label != -100]))
    sums = []
    for hidden in (logits, torch.zeros_like(logits)):
        policy = TreePolicy.__new__(TreePolicy)
        torch.nn.Module.__init__(policy)
        policy.model = SimpleNamespace(
            base_model=lambda hidden=hidden, **inputs: SimpleNamespace(
                last_hidden_state=hidden[:, : inputs["input_ids"].shape[1]]
            ),
            get_output_embeddings=lambda: torch.nn.Identity(),
        )
        trees = [build_tree(prompt, [answer]) for prompt, answer in sequences]
        sums.append(policy(*pad_trees(trees, 0), 1.0).double().sum(1))
    lengths = torch.tensor([len(answer) for _, answer in sequences])
    assert sums[0].tolist() == pytest.approx(expected["policy_seq_logps"], abs=1e-6)
    assert sums[1].tolist() == pytest.approx(expected["ref_seq_logps"], abs=1e-6)
    losses, stats = dpo_loss(sums[0][None], sums[1][None], lengths[None], case["beta"], 0.0, 0.0)
    assert losses.item() == pytest.approx(expected["loss"], abs=1e-6)
    assert stats["margin"].item() == pytest.approx(expected["reward_margin"], abs=1e-6)
    assert lengths.tolist() == expected["num_scored_tokens"]


def test_targets():
    case = CASES["listwise_case"]
    logps, ref, scores = (double(*case[key]) for key in ("policy_logps", "ref_logps", "rewards"))
    for strategy, key in (("dpo_listwise", "listwise_dpo_loss"), ("weighted", "weighted_nll_sum_logps")):
        loss = target_loss(logps, ref, scores, strategy, case["beta"], case["lam"]).item()
        assert loss == pytest.approx(case["expected"][key], abs=1e-9)
    pair = dpo_loss(logps[None, :2], ref[None, :2], torch.ones(1, 2), 0.1, 0.0, 0.0)[0].item()
    assert target_loss(logps[:2], ref[:2], scores[:2], "dpo_listwise", 0.1, 1e-3).item() == pytest.approx(
        pair, abs=1e-9
    )


def test_targets_project_the_optimum():
    """Samples in the proportions of pi_ref carry the closed form's weights, pi_ref exp(r / lambda) / Z."""
    case, drawn = CASES["closed_form_case"], [0] * 5 + [1] * 3 + [2] * 2
    logps = torch.zeros(10, dtype=torch.double, requires_grad=True)
    scores = double(*(case["rewards"][i] for i in drawn))
    target_loss(logps, torch.zeros(10), scores, "weighted", 0.1, case["lam"]).backward()
    mass = [-sum(logps.grad[j].item() for j in range(10) if drawn[j] == i) for i in range(3)]
    assert mass == pytest.approx(case["expected"]["pi_star"], abs=1e-9)
    z = sum(p * math.exp(r / case["lam"]) for p, r in zip(case["pi_ref"], case["rewards"]))
    assert case["lam"] * math.log(z) == pytest.approx(case["expected"]["optimal_value_lambda_log_Z"], abs=1e-9)
    assert z == pytest.approx(case["expected"]["Z"], abs=1e-9)


def test_point_estimates_reward_guessing():
    """The theory's example: log p of one random outcome as a score gives a guess .8 and the honest rationale .2."""
    case = CASES["seed_theory_case"]
    rows, means = case["p_y_given_z_rows_A_B_C_D_zstar"], torch.zeros(5)
    for outcome in range(4):
        scores = torch.tensor([row[outcome] for row in rows]).double().log()
        logps = torch.zeros(5, dtype=torch.double, requires_grad=True)
        target_loss(logps, torch.zeros(5), scores, "weighted", 0.1, 1.0).backward()
        weights = -logps.grad
        assert weights[outcome].item() == pytest.approx(case["expected"]["target_weight_guess_when_right"])
        assert weights[4].item() == pytest.approx(case["expected"]["target_weight_zstar"])
        means += weights.float() / 4
    assert means.tolist() == pytest.approx(case["expected"]["mean_target_over_4_outcomes"])


def test_parity_with_trl():
    """Values and gradients of TRL's own loss on random sequences of random lengths."""
    trl = pytest.importorskip("trl")
    torch.manual_seed(0)
    pairs, time, prompt = 5, 9, 3
    mask = torch.zeros(2 * pairs, time, dtype=torch.long)  # [chosen, rejected], as TRL stacks them
    for row in mask:
        row[prompt : prompt + random.Random(int(row.sum())).randint(2, 6)] = 1
    mask[1, 5:], mask[7, 4:] = 0, 0
    ref = torch.randn(2 * pairs) - 9
    ours = torch.randn(2 * pairs, time - 1).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x,
        gather=lambda x: x), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], beta=0.3, label_smoothing=0.0,
        use_weighting=False, _metrics={"train": Counter(), "eval": Counter()}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    trainer._metrics["train"] = type("Lists", (dict,), {"__missing__": lambda self, key: self.setdefault(key, [])})()
    outputs = SimpleNamespace(
        log_probs=theirs * mask[:, 1:], aux_loss=None, entropy=torch.zeros(2 * pairs, time - 1),
        mean_logits=torch.zeros(2 * pairs, time - 1), is_top1=torch.zeros(2 * pairs, time - 1, dtype=torch.bool),
    )  # fmt: skip
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
              "ref_chosen_logps": ref[:pairs], "ref_rejected_logps": ref[pairs:]}  # fmt: skip
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    sums = (ours * mask[:, 1:]).sum(1).view(2, pairs).T
    mine, _ = dpo_loss(sums, ref.view(2, pairs).T, mask.sum(1).view(2, pairs).T, 0.3, 0.0, 0.0)
    mine.mean().backward()
    assert mine.mean().item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_learning_rate_schedule():
    case = CASES["lr_schedule_case"]
    for step, expected in zip(case["steps"], case["multiplier"]):
        assert lr_multiplier(step, case["warmup"], case["total"], "linear") == pytest.approx(expected, abs=1e-9)
    for schedule in ("linear", "constant"):
        values = [lr_multiplier(step, 5, 30, schedule) for step in range(30)]
        assert values[4] == 1.0 and min(values) >= 0.0 and (schedule == "constant") == (values[-1] == 1.0)
        assert lr_multiplier(2, 10, 3, schedule) == pytest.approx(0.3)  # shorter than its warm-up
        assert lr_multiplier(0, 0, 1, schedule) == 1.0  # a single step is not the last one, at which nothing is learned


def test_lora_parameter_count():
    """r = 64 on q, k, v, o, gate, up and down of Llama-3.1-8B, as in the original; nothing is put in memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        model = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == CASES["lora_param_count_check"]["expected_trainable"]


# ---- pairs and units -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES["pairing_cases"], ids=lambda case: "".join(map(str, case["scores"])))
def test_pairs(case):
    samples = [{"indices": 0, "scores": float(score)} for score in case["scores"]]
    pairs = make_units(samples, "dpo", 0, [0])
    assert len(pairs) == case["num_pairs"]
    if isinstance(case["pairs_chosen_rejected"], list):
        assert pairs == case["pairs_chosen_rejected"]
    few = make_units(samples, "dpo", 2, [0])
    assert len(few) == len({tuple(pair) for pair in few}) == min(2, len(pairs)) and all(pair in pairs for pair in few)


def answers(*scores, question=0):
    return [{"indices": question, "scores": float(s)} for s in scores]


def test_units():
    rows = answers(0, 1, 1) + answers(1, 1, question=5) + answers(0, 0, question=3) + answers(0, 1, question=8)
    units = {s: make_units(rows, s, 0, [0]) for s in ("sft", "sft_unique", "weighted", "dpo", "dpo_listwise")}
    assert units["sft"] == [[1], [2], [3], [4], [8]]
    assert units["sft_unique"] == [[1], [3], [8]]
    assert units["dpo"] == [[1, 0], [2, 0], [8, 7]]
    assert units["dpo_listwise"] == [[1, 2, 0], [8, 7]]
    assert units["weighted"] == [[1, 2, 0], [3, 4], [8, 7]]
    assert make_units(rows, "dpo", 1, [0])[1:] == [[8, 7]] and len(make_units(rows, "dpo", 1, [0])) == 2


# ---- prefix trees ----------------------------------------------------------------------------------------------------
class Rows(torch.nn.Module):
    """The same log-probabilities from a row of its own for each answer, without pads: what trees must equal."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, prompt, answer):
        logits = self.model(input_ids=torch.tensor([prompt + answer])).logits[0, :-1].float()
        return logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(answer) - 1), answer]


def random_answers(generator):
    """Prompts and answers with shared beginnings, a copy, an answer that another begins with, one of a single token."""
    prompts = [[generator.randrange(3, 500) for _ in range(n)] for n in (30, 7)]
    start = [generator.randrange(3, 500) for _ in range(6)]
    tails = [[generator.randrange(3, 500) for _ in range(n)] for n in (9, 4, 1, 12)]
    return [
        (prompts[0], start + tails[0]), (prompts[1], start + tails[1]), (prompts[0], start + tails[1]),
        (prompts[0], start), (prompts[1], tails[2]), (prompts[0], tails[3]), (prompts[0], start + tails[0]),
    ]  # fmt: skip


def test_plant_shares_beginnings():
    """The docstring's example, and the definition: a column sees what leads to it and nothing else."""
    tree = build_tree([1, 2], [[3, 4], [3, 5]])
    assert tree["ids"] == [1, 2, 3, 4, 5] and tree["depth"] == [0, 1, 2, 3, 3] and tree["parent"] == [0, 0, 1, 2, 2]
    assert tree["end"] == [5, 5, 5, 4, 5] and tree["paths"] == [[2, 3], [2, 4]]
    generator = random.Random(0)
    for _ in range(50):
        prompt = [generator.randrange(3) for _ in range(generator.randint(1, 4))]
        answers = [[generator.randrange(3) for _ in range(generator.randint(0, 5))] for _ in range(6)]
        tree = build_tree(prompt, answers)
        prefixes = {tuple((prompt + answer)[: n + 1]) for answer in answers for n in range(len(prompt + answer))}
        assert len(tree["ids"]) == len(prefixes)
        for answer, path in zip(answers, tree["paths"]):
            assert [tree["ids"][column] for column in path] == answer
            column = path[-1] if path else len(prompt) - 1
            seen = [tree["ids"][k] for k in range(column + 1) if column < tree["end"][k]]
            assert seen == prompt + answer


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "GPTNeoX", "GPT2"])
def test_trees_equal_rows(kind):
    """Values and gradients of the forward pass on trees equal those of one row an answer, with any pad id or split."""
    import transformers

    sizes = {"vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64}
    if kind in ("Qwen2", "Llama"):
        sizes["num_key_value_heads"] = 2
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = AutoModelForCausalLM.from_config(config).double()
    policy = TreePolicy.__new__(TreePolicy)
    torch.nn.Module.__init__(policy)
    policy.model = model.eval()
    prompts, answers = zip(*random_answers(random.Random(1)), strict=True)
    weights = torch.randn(len(answers), dtype=torch.double)

    def gradients(logps):
        model.zero_grad()
        (logps * weights).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    rows = [Rows(model)(prompt, answer).double() for prompt, answer in zip(prompts, answers)]
    expected = torch.stack([row.sum() for row in rows])
    first = gradients(expected)
    for pad_id, splits in ((0, [range(7)]), (411, [range(7)]), (2, [range(3), range(3, 7)])):
        logps = torch.zeros(7, dtype=torch.double)
        for indices in splits:
            trees = build_trees(prompts, answers, indices)
            found = policy(*pad_trees(trees, pad_id), 1.0).double()
            order = [i for tree in trees for i in tree["indices"]]
            logps = logps.index_add(0, torch.tensor(order), found.sum(1))
            for i, row in zip(order, found):
                torch.testing.assert_close(row[: len(answers[i])], rows[i], atol=2e-6, rtol=0)  # formed in fp32
                assert (row[len(answers[i]) :] == 0).all()
        torch.testing.assert_close(logps, expected, atol=2e-5, rtol=0)
        for a, b in zip(first, gradients(logps), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def toy_policy():
    return TreePolicy(str(TOY_MC / "model"), torch.float32, lora_r=0, lora_alpha=0)


def test_what_is_scored():
    """One BOS at most, the prompt never, the end token always."""
    tokenizer = AutoTokenizer.from_pretrained(TOY_MC / "model")
    policy = toy_policy()
    prompt = encode_prompt(tokenizer, "A bag holds 7 pens.", "")
    completion = tokenizer("Guess.\nAnswer: B")["input_ids"] + [tokenizer.eos_token_id]
    logps = score_trees(policy, [prompt], [completion], 1.0, Args(), 0)[0]
    with torch.no_grad():
        full = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    expected = [full[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion)]
    assert logps.tolist() == pytest.approx(expected, abs=1e-5) and completion[-1] == tokenizer.eos_token_id


STRATEGIES = ("sft", "sft_unique", "weighted", "dpo", "dpo_listwise")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_of_units_by_hand(strategy):
    """The loss and its gradient, however the units are cut into micro-batches, equal a plain loop over the formulas."""
    policy, generator = toy_policy(), random.Random(0)
    samples = []
    for number in range(4):
        prompt = [generator.randrange(3, 500) for _ in range(generator.randint(5, 20))]
        start = [generator.randrange(3, 500) for _ in range(generator.randint(0, 5))]
        for k in range(4):
            answer = start + [generator.randrange(3, 500) for _ in range(generator.randint(1, 9))]
            samples.append({"indices": number, "prompt_ids": prompt, "token_ids": answer, "scores": float(k % 2)})
    refs = torch.tensor([-5.0 * len(sample["token_ids"]) for sample in samples]).double()
    units = make_units(samples, strategy, 0, [0])
    random.Random(1).shuffle(units)
    args = Args(strategy=strategy, rpo_alpha=0.5 if strategy == "dpo" else 0.0)

    def gradient():
        found = torch.cat([p.grad.flatten() for p in policy.parameters()])
        policy.zero_grad()
        return found

    plain = Rows(policy.model)
    logps = [plain(sample["prompt_ids"], sample["token_ids"]).sum() for sample in samples]
    lengths = [len(sample["token_ids"]) for sample in samples]
    losses = []
    for unit in units:
        if strategy in ("sft", "sft_unique"):
            losses.append(-logps[unit[0]])
        elif strategy == "dpo":
            h = args.beta * (logps[unit[0]] - refs[unit[0]] - logps[unit[1]] + refs[unit[1]])
            losses.append(-torch.nn.functional.logsigmoid(h) - 0.5 * logps[unit[0]] / lengths[unit[0]])
        else:
            w = torch.tensor([samples[i]["scores"] / args.score_lambda for i in unit]).softmax(0)
            of_unit = torch.stack([logps[i] for i in unit])
            if strategy == "dpo_listwise":
                of_unit = (args.beta * (of_unit - refs[unit])).log_softmax(0)
            losses.append(-(w * of_unit).sum())
    total = sum(lengths[i] for (i,) in units) if strategy.startswith("sft") else len(units)
    expected = sum(losses) / total
    expected.backward()
    first = gradient()
    for tokens in (16384, 60, 1):
        args.max_tokens_per_microbatch = tokens
        figures = run_units(policy, samples, units, refs, args, 0, train=True)
        assert figures["loss"] == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(gradient(), first, atol=1e-5, rtol=1e-3)
    assert run_units(policy, samples, units, refs, args, 0, train=False)["loss"] == pytest.approx(
        expected.item(), rel=1e-5
    )
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize("settings", [
    {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0},
    {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64, "layer_types": None},
    {"layer_types": ["full_attention", "linear_attention"]},
], ids=["qwen2", "mistral", "linear"])  # fmt: skip
def test_models_that_trees_would_mislead(settings, tmp_path):
    config = json.loads((TOY_MC / "model" / "config.json").read_text()) | {"layer_types": None} | settings
    if config["layer_types"]:
        config["num_hidden_layers"] = len(config["layer_types"])
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(SystemExit) as stopped:
        check_attention(str(tmp_path))
    assert "prefix trees need full attention" in stopped.value.code
    check_attention(str(TOY_MC / "model"))


# ---- grading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES["answer_extraction_cases"], ids=lambda case: repr(case["text"]))
def test_extraction_cases(case):
    assert extract_letter(case["text"], "simple_evals") == case["simple_evals_parity"]
    assert extract_letter(case["text"], "robust") == case["recommended"]


SIMPLE_EVALS = {
    "Answer:\u200b\u200b\u200b\u200b\u200b\u200bB": "B",
    "A\u0300m\u1ecd\u0300na\u0300: C": "C", "A\u0300nu\u0301go\u0323 : D": "D",
    "\u00c0m\u1ecd\u0300n\u00e0: C": None, "\u00c0n\u00fag\u1ecd: D": None,  # composed: not that tool's bytes
    "উত্তর : ঢ": "D", "الإجابة الصحيحة هي: ت": "ت", "Answer :\nB": None, "Answer:\tb": "b", "答：Ａ Answer: C": "C",
}  # fmt: skip


@pytest.mark.parametrize("text", SIMPLE_EVALS, ids=ascii)
def test_simple_evals_letters(text):
    """That tool's labels, byte for byte, in its order."""
    assert extract_letter(text, "simple_evals") == SIMPLE_EVALS[text]
    assert len(LABELS) == 41


LETTERS = {
    "Answer: A dog": None, "A or B?": None, "Answer: A or B?": None, "Answer: B/C": None, "Answer: B or C": None,
    "Answer:\nB": "B", "Answer:\n\n**B**": "B", "Answer:\nA dog": None, "Answer: A is correct": "A",
    "Answer: (A) or (B)": None, "Answer: D and A": None, "Answer: C\nA/B testing": "C", "Answer: A dog\nAnswer: B": "B",
    "A\u0300m\u1ecd\u0300na\u0300: C": "C", "\u00c0m\u1ecd\u0300n\u00e0: C": "C", "Answer: B, A is wrong": "B",
    "Answer:C<|im_end|>": "C", "Answer: (d)": "D", "**Answer: B**": "B", "Answer : b.": "B", "\\text{Answer: A}": "A",
    "الإجابة: ب": "B", "الإجابة الصحيحة هي: د": "D", "উত্তর: ড": "C", "উত্তরঃ ঢ": "D", "উত্তর: বাংলা": None,
    "Jibu: A": "A", "정답: B": "B", "答え：Ｄ": "D", "Respuesta: C)": "C", "Àdáhùn: C": "C", "Answer: D'Alembert": None,
    "Answer: E": None, "答案：B选项": "B", "정답: B입니다": "B", "答え：Bです": "B", "Answer: a decrease": None,
    "Answer: `B`": "B", 'Answer: "c"': "C", "Answer: \\textbf{B}": "B", "答案是：B": "B", "Answer: a.": "A",
    "Respuesta: a la derecha": None,
    "Answer: A\nAnswer: none": "A", "Answer: $\\boxed{C}$.": "C", "": None, "Answer:": None, "उत्तर: A": "A",
    "\u200bAnswer\u200b:\u200bB": "B", "Answer: B, because C is wrong": "B", "I'd say Answer: Bob": None,
}  # fmt: skip


@pytest.mark.parametrize("text", LETTERS, ids=repr)
def test_robust_letters(text):
    assert extract_letter(text, "robust") == LETTERS[text]


def test_extraction_takes_any_text():
    generator = random.Random(0)
    pieces = ["Answer", ":", " ", "(", "A", "ব", "：", "答", "$\\boxed{", "\n", "الإجابة", "\u0301", "x", "**"]
    for _ in range(2000):
        text = "".join(generator.choices(pieces, k=generator.randint(0, 40)))
        for mode in ("robust", "simple_evals"):
            letter = extract_letter(text, mode)
            assert letter is None or len(letter) == 1
    for text in ("Answer " * 20000, "Answer" + " " * 200000, "答案" * 50000, "(" * 100000):
        assert extract_letter(text, "robust") is None


def test_figures():
    def row(question, subject, score, tokens, letter="A", finish="stop"):
        return {"indices": question, "subjects": subject, "scores": score, "token_ids": tokens, "model_answers": letter,
                "finish_reason": finish}  # fmt: skip

    rows = [
        row(1, "anatomy", 1.0, list(range(20))),
        row(1, "anatomy", 0.0, [1, 2] * 30, None, "length"),
        row(2, "astronomy", 1.0, [1] * 4),
        row(2, "astronomy", 1.0, [3]),
        row(3, "formal_logic", 0.0, [3] * 9, "B"),
    ]
    figures = choice_figures(rows)
    expected = {
        "accuracy": 0.6, "no_eos": 0.2, "no_answer": 0.2, "length": 18.8, "solved": 2 / 3,
        "mixed": 1 / 3, "subject_anatomy": 0.5,
        "subject_astronomy": 1.0, "subject_formal_logic": 0.0, "accuracy_low": 0.2307, "accuracy_high": 0.8824,
    }  # fmt: skip
    assert figures == pytest.approx(expected, abs=1e-4)
    assert "solved" not in choice_figures(rows[1:2])


# ---- data ------------------------------------------------------------------------------------------------------------
def test_split():
    case = CASES["split_test_vector"]
    split = split_ids(case["n"])
    for name, shown in (("train", 10), ("val", 8), ("test", 8)):
        assert len(split[name]) == case[name] and split[name][:shown] == case[f"{name}_first{shown}"]
    assert sorted(sum(split.values(), [])) == sorted(set(sum(split.values(), [])))


@pytest.mark.skipif(not MMLU.exists() or not (QWEN / "tokenizer.json").exists(), reason=f"no MMLU in {MMLU}")
def test_real_mmlu():
    """All 14,042 rows load; prompts go through Qwen2.5's tokenizer whole and once."""
    questions = load_questions(str(MMLU))
    assert len(questions) == 14042 and len({q["subject"] for q in questions}) == 57
    assert Counter(q["answer"] for q in questions) == {"A": 3222, "B": 3462, "C": 3582, "D": 3776}
    tokenizer, args = AutoTokenizer.from_pretrained(QWEN), Args()
    for question in [questions[i] for i in split_ids(14042)["train"][::60]]:
        text = user_message(question, args.preamble, args.meta_prompt)
        assert tokenizer.decode(encode_prompt(tokenizer, text, args.system_prompt)) == (
            f"<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
    figures = choice_figures([
        {"indices": q["id"], "subjects": q["subject"], "scores": 1.0, "token_ids": [1], "model_answers": "A",
         "finish_reason": "stop"} for q in questions
    ])  # fmt: skip
    assert sum(key.startswith("subject_") for key in figures) == 57


QUESTION = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "sums"}


def test_prompt():
    row = QUESTION | {"answer": "B"}
    assert user_message(row, "Answer this.", "Think.") == "Answer this. Think.\n\n1 + 1?\n\nA) 1\nB) 2\nC) 3\nD) 4"
    assert user_message(row, "", "", hint=True) == "1 + 1?\n\nA) 1\nB) 2 (CORRECT)\nC) 3\nD) 4"


def test_rationalisations_that_speak_of_the_mark():
    for text in ("B (CORRECT)", "The hint says B", "hints: B", "B is marked", "As stated, B", "the given answer is B"):
        assert LEAK.search(text), text
    for text in ("Correct: B", "Der Hintergrund", "remarkable", "He stated it", "Hinton's answer"):
        assert not LEAK.search(text), text


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_both_layouts_in_both_formats(tmp_path):
    text = 'a "b",\nc\u2028d'
    mmmlu = {"": 0, "Question": text, "A": "1", "B": "nan", "C": "", "D": "None", "Answer": "c", "Subject": "s"}
    other = {"question": text, "choices": ["1", "nan", "", "None"], "answer": "c", "subject": "s"}
    rows = [QUESTION, other] * 5
    loaded = load_questions(write_jsonl(tmp_path / "a.jsonl", rows))
    assert loaded[1] == other | {"id": 1, "answer": "C"}
    assert loaded[2] == QUESTION | {"id": 2, "answer": "B"}
    assert load_questions(write_csv(tmp_path / "b.csv", [mmmlu] * 10))[1] == loaded[1]
    assert load_questions(write_jsonl(tmp_path / "c.jsonl", [mmmlu] * 10))[1] == loaded[1]
    listed = [QUESTION | {"choices": json.dumps(QUESTION["choices"])}] * 10
    assert load_questions(write_csv(tmp_path / "d.csv", listed))[2] == loaded[2]


BAD = {
    "no question": {"choices": ["1"] * 4, "answer": 0}, "blank question": QUESTION | {"question": " "},
    "three choices": QUESTION | {"choices": ["1"] * 3}, "null choice": QUESTION | {"choices": ["1", None, "2", "3"]},
    "answer 4": QUESTION | {"answer": 4}, "answer E": QUESTION | {"answer": "E"}, "no answer": {"question": "a"},
    "a list": [1, 2], "choices no list": QUESTION | {"choices": "1, 2, 3, 4"}, "not JSON": "{question: 1}",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=lambda name: name.replace(" ", "_"))
def test_bad_rows_are_named(name, tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [QUESTION] * 11 + [BAD[name]])
    with pytest.raises(SystemExit) as stopped:
        load_questions(path)
    assert f"{path}, line 12" in stopped.value.code and "\n" not in stopped.value.code


def test_bad_csv_is_named(tmp_path):
    rows = [QUESTION | {"choices": '["a", "b", "c", "d"]'}] * 10 + [QUESTION | {"answer": 7}]
    path = write_csv(tmp_path / "bad.csv", rows)
    with pytest.raises(SystemExit, match=f"{path}, line 12 needs 'question'"):
        load_questions(path)
    with open(path, "a") as file:
        file.write('"unclosed')
    with pytest.raises(SystemExit, match="or no CSV behind line 12"):
        load_rows(path)


# ---- samples made elsewhere ------------------------------------------------------------------------------------------
def original_csv(path, *rows):
    """Samples as the original project writes them, with Llama 3's header tokens."""
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant<|eot_id|>"
    return write_csv(path, [
        {"": i, "indices": index, "prompted_questions": f"{head}{asked}<|eot_id|>", "model_answers": letter,
         "subjects": "s", "correct_answers": "B", "raw_responses": raw, "scores": score}
        for i, (index, asked, letter, raw, score) in enumerate(rows)
    ])  # fmt: skip


def test_generations_of_the_original(tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(TOY_MC / "model")
    split = {4: QUESTION | {"id": 4, "answer": "B"}, 9: QUESTION | {"id": 9, "question": "2 + 0?", "answer": "B"}}
    dataset = [split.get(i, split[4]) for i in range(12)]
    message = lambda row: user_message(row, "Answer.", "")
    asked = {number: message(row) for number, row in split.items()}
    path = original_csv(
        tmp_path / "a.csv", (4, asked[4], "B", "So 2.\nAnswer: B<|eot_id|>", 1.0), (4, asked[4], "", "On and on", 0.0),
        (4.0, asked[4], "", "", 0.0), (9, asked[9], "A", "Answer: A<|eot_id|>", 0.0),
    )  # fmt: skip
    rows = load_samples(path, dataset, [4, 9], [split[4]], message, tokenizer, 64)
    assert [row["indices"] for row in rows] == [4, 4] and "2 of 4 samples" in capsys.readouterr().out
    assert tokenizer.decode(rows[0]["token_ids"]) == "So 2.\nAnswer: B<|im_end|>"
    assert rows[0]["token_ids"][-1] == tokenizer.eos_token_id and rows[0]["finish_reason"] == "stop"
    assert tokenizer.decode(rows[1]["token_ids"]) == "On and on" and rows[1]["finish_reason"] == "length"
    assert (rows[0]["model_answers"], rows[0]["scores"], rows[1]["model_answers"]) == ("B", 1.0, None)
    problems = {
        "is not in this split": (7, asked[4], "B", "x", 1.0), "another prompt": (4, "What is 1 + 1?", "B", "x", 1.0),
        "needs the columns": ("four", asked[4], "B", "x", 1.0),
        "needs the columns indices": (4, asked[4], "B", "x", "good"),
        r"scores \(0 or 1\)": (4, asked[4], "B", "x", "nan"), "another number": (4.5, asked[4], "B", "x", 1.0),
        "an answer of 100 tokens; raise --max-new-tokens": (4, asked[4], "B", "1" * 100, 1.0),
    }  # fmt: skip
    for text, row in problems.items():
        bad = original_csv(tmp_path / "b.csv", row)
        with pytest.raises(SystemExit, match=text) as stopped:
            load_samples(bad, dataset, [4, 9], list(split.values()), message, tokenizer, 64)
        assert "b.csv, line" in stopped.value.code
    with pytest.raises(SystemExit, match="holds no sample"):
        load_samples(path, dataset, [4, 9], [], message, tokenizer, 64)


# ---- what a user can get wrong ---------------------------------------------------------------------------------------
ARGUMENTS = {
    "dpo with one sample": (["--samples-per-question", 1], "--samples-per-question must be at least 2"),
    "half smoothed": (["--label-smoothing", 0.5], "it must be below 0.5"),
    "beta 0": (["--beta", 0], "--beta is 0.0; it must be over 0"),
    "lambda 0": (["--score-lambda", 0], "--score-lambda is 0.0; it must be over 0"),
    "lr inf": (["--lr", "inf"], "--lr is inf; it must be a finite number"),
    "rationalize 2": (["--rationalize", 2], "--rationalize is 2.0; it is a share, at most 1"),
    "no such language": (
        ["--dataset", "mmlu_XX-YY"],
        "there is no mmlu_XX-YY; give a .jsonl or .csv, mmlu, or mmlu_",
    ),
    "no such file": (["--dataset", "no.jsonl"], "there is no no.jsonl"),
    "no such reference": (["--ref-model-name", "nobody/nothing"], "nobody/nothing cannot be used"),
    "lora_alpha 0": (["--lora-alpha", 0], "--lora-alpha is 0; it must be over 0"),
    "hub": (["--dataset", "mmlu_YO-NG"], "dataset mmlu_YO-NG (openai/MMMLU, YO_NG) did not load"),
    "nothing fits": (["--max-prompt-tokens", 5], "no train question is left; raise --max-prompt-tokens"),
    "context": (["--max-new-tokens", 1010], "more than the model's 1024; lower --max-new-tokens"),
    "no such samples": (["--preload-train", "no.csv"], "no.csv cannot be read; give a .csv or .jsonl file"),
    "no such model": (["--model-name", "nobody/nothing"], "nobody/nothing cannot be used"),
}


@pytest.mark.parametrize("case", ARGUMENTS, ids=lambda case: case.replace(" ", "_"))
def test_arguments(case, capsys, monkeypatch, tmp_path):
    arguments, message = ARGUMENTS[case]
    error = stop_message(capsys, monkeypatch, tmp_path, *arguments, command=[sys.executable, *STAR_RUN[1:]])
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
