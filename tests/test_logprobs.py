"""Policy and score: the chunked head equals the full one, and nothing but prompt and completion matters."""

import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import Qwen2Config, Qwen2ForCausalLM

import grpo_upskill
from grpo_upskill import Args, Policy, micro_batches, pad_batch, policy_loss

PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12], [13]]
COMPLETIONS = [[14, 15], [16, 17, 18, 19, 2], [20], [21, 22, 23, 2]]


def score(policy, prompts, completions, temperature=1.0, pad_id=0, max_tokens=1000):
    args = Args(temperature=temperature, max_tokens_per_microbatch=max_tokens)
    return grpo_upskill.score(policy, prompts, completions, args, pad_id)


@pytest.fixture
def tiny_policy(tmp_path):
    """A function that makes a policy of random weights, always the same."""

    def make(tied=False, dtype=torch.float32, lora_r=0):
        folder = tmp_path / str(tied)
        tiny_model(tied).save_pretrained(folder)
        torch.manual_seed(0)
        return Policy(str(folder), dtype, lora_r, lora_alpha=8)

    return make


def tiny_model(tied=False):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).train()


def full_logprobs(model, prompt, completion, temperature):
    """One sequence at a time, all logits at once, log_softmax: logit t - 1 scores token t."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0].float() / temperature
    return logits.log_softmax(-1)[torch.arange(len(prompt), ids.shape[1]) - 1, ids[0, len(prompt) :]]


@pytest.mark.parametrize("head_chunk", [1, 3, 1000])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_equals_full_values_and_gradients(head_chunk, tied, temperature, tiny_policy, monkeypatch):
    monkeypatch.setattr(grpo_upskill, "HEAD_CHUNK", head_chunk)
    policy = tiny_policy(tied)
    torch.manual_seed(1)
    weights = torch.randn(4, 5)
    reference = [full_logprobs(policy.model, p, c, temperature) for p, c in zip(PROMPTS, COMPLETIONS)]
    sum((w[: len(r)] * r).sum() for w, r in zip(weights, reference)).backward()
    expected = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()

    logps = policy(*pad_batch(PROMPTS, COMPLETIONS, pad_id=0), temperature)
    for row, r in zip(logps, reference):
        torch.testing.assert_close(row[: len(r)], r, atol=2e-6, rtol=1e-5)
        assert (row[len(r) :] == 0).all()
    (weights * logps).sum().backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_no_logits_are_kept(tiny_policy):
    """Autograd keeps hidden states, and no tensor with a vocabulary's width: the backward pass makes logits again."""
    policy, widths = tiny_policy(), set()

    def see(tensor):
        widths.add(tensor.shape[-1] if tensor.ndim else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        policy(*pad_batch(PROMPTS, COMPLETIONS, pad_id=0), 1.0)
    assert 32 in widths and 97 not in widths
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        full_logprobs(policy.model, PROMPTS[0], COMPLETIONS[0], 1.0)
    assert 97 in widths  # the plain way does keep them


def test_pad_id_order_and_split_change_nothing(tiny_policy):
    policy = tiny_policy()
    whole = score(policy, PROMPTS, COMPLETIONS)
    for pad_id, max_tokens in ((0, 7), (50, 1000), (14, 12), (96, 1)):
        torch.testing.assert_close(
            score(policy, PROMPTS, COMPLETIONS, 1.0, pad_id, max_tokens), whole, atol=2e-6, rtol=0
        )
    order = [2, 0, 3, 1]
    shuffled = score(policy, [PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order], max_tokens=9)
    torch.testing.assert_close(shuffled, whole[order], atol=2e-6, rtol=0)
    assert score(policy, [], []).shape == (0, 0)


def test_gradient_of_a_step_does_not_depend_on_the_split(tiny_policy):
    """One batch, cut into micro-batches in four ways: the summed gradient of the dapo loss is the same."""
    advantages, gradients = torch.tensor([1.0, -0.5, 0.3, -1.0]), []
    tokens = sum(map(len, COMPLETIONS))
    for max_tokens in (1, 8, 14, 1000):
        policy = tiny_policy()
        for rows in micro_batches([len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS)], max_tokens):
            batch = pad_batch([PROMPTS[i] for i in rows], [COMPLETIONS[i] for i in rows], 0)
            logps = policy(*batch, 1.0)
            mask = torch.arange(logps.shape[1]) < batch[2][:, None]
            weights = torch.ones_like(logps)
            policy_loss(logps, logps.detach(), advantages[rows], mask, Args(), tokens, weights)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)


def test_micro_batches():
    lengths = [5, 9, 2, 7, 7, 1, 30]
    batches = micro_batches(lengths, 16)
    assert sorted(sum(batches, [])) == list(range(7))
    assert batches[0] == [6]  # longer than the budget: alone, never dropped
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 16 for b in batches)
    assert micro_batches([3, 3, 3], 9) == [[0, 1, 2]] and micro_batches([], 9) == []


def test_lora_starts_at_the_base_model_and_reference_is_adapters_off(tiny_policy):
    base = score(tiny_policy(), PROMPTS, COMPLETIONS)
    policy = tiny_policy(lora_r=4)
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)
    torch.testing.assert_close(score(policy, PROMPTS, COMPLETIONS), base)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted = score(policy, PROMPTS, COMPLETIONS)
    assert (adapted - base).abs().max() > 0.01
    with policy.model.disable_adapter():
        torch.testing.assert_close(score(policy, PROMPTS, COMPLETIONS), base)

    # under autocast peft's own cast of the input to fp32 changes nothing, which is why it is off
    layers = [module for module in policy.modules() if hasattr(module, "cast_input_dtype_enabled")]
    assert len(layers) >= 14 and not any(layer.cast_input_dtype_enabled for layer in layers)
    with torch.autocast("cpu", torch.bfloat16):
        without = score(policy, PROMPTS, COMPLETIONS)
        for layer in layers:
            layer.cast_input_dtype_enabled = True
        assert torch.equal(score(policy, PROMPTS, COMPLETIONS), without)
    assert (without - adapted).abs().max() < 0.1


def test_bf16_weights_are_scored_in_fp32(tiny_policy):
    """A log-softmax formed in bf16 is off in the third digit; formed in fp32 from bf16 logits it stays normalised."""
    policy = tiny_policy(dtype=torch.bfloat16)
    total = sum(policy(*pad_batch([[5]], [[token]], 0), 1.0).exp().item() for token in range(97))
    assert total == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("max_tokens", [4096, 16384])
def test_padding_stays_under_ten_percent(max_tokens):
    """Of lengths as GSM8K's rollouts have them: 80 completions of 8 questions, log-normal around 220 tokens."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        prompts = np.repeat(rng.normal(110, 25, 8).clip(60, 250), 10)
        lengths = (prompts + rng.lognormal(np.log(220), 0.45, 80).clip(20, 768)).astype(int).tolist()
        batches = micro_batches(lengths, max_tokens)
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        assert 1 - sum(lengths) / padded < 0.1
        assert len(batches) < 30


def test_collectives_see_tensors_of_the_device_only(tiny_policy, monkeypatch):
    """On GPUs only NCCL exists, which knows no CPU tensors. Here "meta" stands for the GPU."""
    seen = []
    policy = tiny_policy()
    monkeypatch.setattr(grpo_upskill, "WORLD_SIZE", 2)
    monkeypatch.setattr(grpo_upskill, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(grpo_upskill.dist, "all_reduce", lambda tensor: seen.append(tensor.device.type))
    monkeypatch.setattr(policy, "reshard", lambda: None, raising=False)
    monkeypatch.setattr(policy, "forward", lambda ids, prompt_lens, completion_lens, _: torch.zeros(1, 2))
    with pytest.raises(NotImplementedError):  # a meta tensor cannot come back to the CPU; a GPU's can
        score(policy, [[5, 6]], [[7, 8]])
    assert seen == ["meta"]
    source = (ROOT / "grpo_upskill.py").read_text()
    assert len(re.findall(r"dist\.(all_|reduce|broadcast|gather|scatter)", source)) == 2  # this one, and objects
