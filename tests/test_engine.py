"""The contract with vLLM: after any number of weight syncs, engine and trainer give the same log-probabilities.

A prompt of over 300 tokens and prefix caching on, because stale weights, a stale prefix cache and a stale tied head
each show only on a prompt that spans several cache blocks.
"""

import pathlib

import pytest
import torch
from conftest import ROOT, SMALL_RUN, training
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import grpo_upskill
from grpo_upskill import Args, Policy, make_engine, sample, sync_weights

TOY = pathlib.Path(__file__).parent / "toy" / "model"
SHORT = ["--eval-size", "2", "--eval-every", "100", "--save-every", "100"]


def load(folder, lora_r):
    """The model in fp32, with LoRA adapters (alpha 16) if lora_r is not 0."""
    return Policy(str(folder), torch.float32, lora_r, 16)


def score(policy, prompts, completions, temperature=1.0):
    return grpo_upskill.score(policy, prompts, completions, Args(temperature=temperature), 0)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder_and_engine(request, tmp_path_factory):
    """A random model with the toy's tokenizer, and an engine for it."""
    folder = tmp_path_factory.mktemp("tied" if request.param else "untied")
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=request.param,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    engine = make_engine(Args(model_name=str(folder)), 512)
    yield str(folder), engine
    del engine


def long_prompts(vocabulary):
    torch.manual_seed(7)
    shared = torch.randint(3, vocabulary, (330,)).tolist()
    return [shared, shared + [5, 6], shared[:200], shared[:17]]


@pytest.mark.parametrize("lora_r", [0, 8], ids=["full", "lora"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_trainer_and_engine_agree_after_three_syncs(folder_and_engine, lora_r, temperature):
    folder, llm = folder_and_engine
    policy = load(folder, lora_r)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    seen = []
    for number in range(3):
        with torch.no_grad():
            for parameter in trainable:
                parameter.add_(0.05 * torch.randn_like(parameter))
        sync_weights(llm, policy)
        prompts = [prompt for prompt in long_prompts(policy.base.config.vocab_size) for _ in range(3)]
        samples = sample(llm, prompts[::3], 3, temperature, 24, [number])
        tokens = [s["tokens"] for s in samples]
        ours = score(policy, prompts, tokens, temperature)
        theirs = torch.zeros_like(ours)
        for row, s in zip(theirs, samples):
            row[: len(s["logps"])] = torch.tensor(s["logps"])
        assert (ours - theirs).abs().max() < 1e-4
        seen.append(ours[:, 0])
    assert (
        seen[0] - seen[2]
    ).abs().max() > 0.05  # the pushes did change the policy: agreement is not by standing still


def test_sample_keeps_order_ends_and_limits(folder_and_engine):
    folder, llm = folder_and_engine
    policy = load(folder, 0)
    sync_weights(llm, policy)
    eos = policy.base.config.eos_token_id
    prompts = [[5, 6, 7], [8, 9]]
    samples = sample(llm, prompts, 40, 1.0, 30, [1, 2])
    assert len(samples) == 80
    assert len({tuple(s["tokens"]) for s in samples}) > 70  # the copies of a prompt differ
    for s in samples:
        assert len(s["logps"]) == len(s["tokens"]) <= 30
        assert (s["finish_reason"] == "stop") == (s["tokens"][-1] == eos)
        assert (s["finish_reason"] == "length") == (s["tokens"][-1] != eos and len(s["tokens"]) == 30)
    assert {s["finish_reason"] for s in samples} == {"stop", "length"}  # the case is not vacuous
    torch.rand(3)  # draws follow from the seed alone
    assert sample(llm, prompts, 40, 1.0, 30, [1, 2]) == samples
    assert sample(llm, prompts, 40, 1.0, 30, [1, 3]) != samples


def test_reset_of_the_prefix_cache_is_needed_and_checked(folder_and_engine, monkeypatch):
    folder, llm = folder_and_engine
    monkeypatch.setattr(llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(SystemExit, match="prefix cache"):
        sample(llm, [[5, 6]], 1, 1.0, 4, [1])


def test_merged_weights_are_the_policy(tmp_path, folder_and_engine):
    """W + (alpha / r) B A under Hugging Face names gives the adapted policy's own log-probabilities."""
    folder, _ = folder_and_engine
    policy = load(folder, 8)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    grpo_upskill.save_final(tmp_path / "final", policy, AutoTokenizer.from_pretrained(folder), torch.float32)
    plain = load(tmp_path / "final", 0)
    assert {n for n, _ in policy.merged_weights()} == set(plain.base.state_dict())
    prompts, tokens = [[5, 6, 7]], [[8, 9, 10, 11]]
    expected = score(policy, prompts, tokens)
    torch.testing.assert_close(score(plain, prompts, tokens), expected, atol=1e-5, rtol=0)
    assert (expected - score(load(folder, 0), prompts, tokens)).abs().max() > 0.01
    from peft import PeftModel

    adapted = load(folder, 0)
    adapted.model = PeftModel.from_pretrained(adapted.model, tmp_path / "final" / "adapter")
    torch.testing.assert_close(score(adapted, prompts, tokens), expected, atol=1e-5, rtol=0)


# A fault planted in the script by replacing its text: (before, after, arguments)
SYNC = "        sync_weights(llm, policy)\n"
FAULTS = {
    "sync skipped every second step": (SYNC, "        if step % 2 == 0:\n    " + SYNC, []),
    "never synced": (SYNC, "", []),
    "sampled at another temperature": ("copies, args.temperature, args.max", "copies, 0.9, args.max", []),
    "LoRA's delta dropped": (' + layer.get_delta_weight("default")', "", ["--lora-r", 4]),
    "prefix cache not reset": ("if not llm.reset_prefix_cache():", "if False:", ["--system-prompt", "Think. " * 60]),
    "top-p below 1": ("max_tokens=max_new_tokens, logprobs=0", "max_tokens=max_new_tokens, logprobs=0, top_p=0.9", []),
    "trained without the prefix": (
        "inputs = pad_batch([prompts[i] for i in micro]",
        "inputs = pad_batch([encode(questions[i], None) for i in micro]",
        [],
    ),
    "scored without the prefix": (
        "score(policy, [prompts[i] for i in scored]",
        "score(policy, [encode(questions[i], None) for i in scored]",
        ["--num-minibatches", 2],
    ),
    "seen in groups without variance too": (SYNC, "", ["--alpha-mi", 0, "--correct-coef", 0, "--mixture-kl-coef", 0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_check_stops_planted_faults(fault, tmp_path):
    before, after, arguments = FAULTS[fault]
    source = (ROOT / "grpo_upskill.py").read_text()
    start, mark, algorithm = source.partition('if __name__ == "__main__":\n')
    where = algorithm if before == SYNC else source
    assert where.count(before) == 1, fault
    faulty = start + mark + algorithm.replace(before, after) if before == SYNC else source.replace(before, after)
    if "without variance" in fault:  # nothing is trained, so the weights are sent wrong
        faulty = source.replace(
            'yield name.replace(".base_layer.", "."), whole(weight)', "yield name, whole(weight) * 1.01"
        )
    (tmp_path / "grpo_faulty.py").write_text(faulty)
    command = [*SMALL_RUN, *SHORT]
    command[1] = str(tmp_path / "grpo_faulty.py")
    process = training("--output-dir", tmp_path, "--num-steps", 5, "--lora-r", 0, *arguments, command=command)
    output = process.communicate()[0]
    assert process.returncode == 1 and "error: trainer and vLLM differ by" in output, output
    assert not (tmp_path / "run" / "final").exists()
