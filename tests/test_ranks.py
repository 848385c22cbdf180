"""Two processes, an engine in each, FSDP2 over gloo: the same samples give the same gradients and weights as one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import IRL_RUN, MEMORY_RUN, PERPLEXITY_RUN, ROOT, SMALL_RUN, STAR_RUN, TOY, TOY_MC, training
from safetensors.torch import load_file

import grpo_upskill
from grpo_upskill import Policy, checkpoints, load_checkpoint, micro_batches, pad_batch, save_checkpoint

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
QUICK = ["--eval-size", "1", "--eval-every", "0"]
RARELY = ["--eval-size", "1", "--eval-every", "1000"]
ARMS = {
    "upskill": (
        [*SMALL_RUN, *RARELY, "--lora-r", "0", "--num-steps", "3", "--save-every", "1", "--max-z", "4"],
        ["--kl-coef", "0.1", "--num-minibatches", "2", "--loss-type", "grpo"],
    ),
    "perplexity": ([*PERPLEXITY_RUN, *RARELY], ["--questions-per-step", "1"]),  # micro-batches with a rank without rows
    "memory": (
        [*MEMORY_RUN, *RARELY, "--lora-r", "4", "--num-steps", "2"],
        ["--intrinsic-control", "shuffled", "--memory-mode", "past", "--knn-k", "3"],
    ),
    "star": (STAR_RUN, ["--lora-r", "0", "--num-iterations", "1", "--evaluation", "loss", "--rpo-alpha", "1"]),
    "irl": (
        [*IRL_RUN, *RARELY, "--lora-r", "0"],
        ["--num-train-epochs", "1", "--online-alpha", "0.3", "--lambda-kl", "0.1", "--calculator"],
    ),
}


def environments(ranks):
    """What torchrun puts into the environment of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run(ranks, command, folder, samples, *extra):
    """One run of a script through replay.py in so many processes; what rank 0 printed."""
    words = [str(ROOT / "tests" / "replay.py"), str(samples), *command[1:], "--output-dir", str(folder), *extra]
    processes = [training(command=[sys.executable, *words], env=environment) for environment in environments(ranks)]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0 and "Traceback" not in output, output
    return outputs[0]


def records(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(one, two, start):
    a, b, start = (load_file(folder / "model.safetensors") for folder in (one / "run/final", two / "run/final", start))
    moved = sum((a[name] - start[name]).square().sum() for name in start) ** 0.5
    apart = sum((a[name] - b[name]).square().sum() for name in start) ** 0.5
    assert moved > 0.01 and apart < 1e-3 * moved, (float(moved), float(apart))
    pairs = list(zip(records(one), records(two), strict=True))
    keys = {key for record, _ in pairs for key in record if key.startswith(("losses/", "charts/", "irl/", "dpo/"))}
    keys -= {
        "charts/samples_per_second",
        "charts/tokens_per_second",
        "dpo/ranking_accuracy",
    }  # accuracy: of ties, noise
    assert "losses/grad_norm" in keys
    for mine, other in pairs:
        for key in keys & set(mine):
            assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=2e-5), (mine["step"], key)


@pytest.mark.parametrize("name", ARMS)
def test_two_ranks_train_as_one_process(name, tmp_path):
    command, extra = ARMS[name]
    samples = tmp_path / "samples.pkl"
    ranks = 3 if name == "perplexity" else 2  # three: shards of unequal size
    output = run(ranks, command, tmp_path / "two", samples, *extra)
    lines = [line for line in output.splitlines() if line.startswith(("step ", "model: ", "written: "))]
    assert len(lines) == len(set(lines)) > 1  # one rank prints
    samples.with_suffix(".new").rename(samples)
    run(1, command, tmp_path / "one", samples, *extra)
    assert_same_training(tmp_path / "one", tmp_path / "two", (TOY_MC if name == "star" else TOY) / "model")
    if name == "memory":
        for folder in ("one", "two"):
            adapter = load_file(tmp_path / folder / "run/final/adapter/adapter_model.safetensors")
            assert adapter and all(weight.shape.count(4) == 1 for weight in adapter.values())  # whole, not a shard
    if name == "upskill":
        resume_with_another_number(command, extra, tmp_path, samples)


def resume_with_another_number(command, extra, folder, samples):
    """Two steps of one run, the third in another number of processes; then again in as many: then bit for bit."""
    import pickle

    rollouts = pickle.loads(samples.read_bytes())
    third = folder / "third.pkl"
    third.write_bytes(pickle.dumps(rollouts[2:]))
    reference = load_file(folder / "two/run/final/model.safetensors")
    for before, ranks in (("two", 1), ("one", 2), ("two", 2)):
        again = folder / f"{before}_then_{ranks}"
        shutil.copytree(folder / before, again)
        shutil.rmtree(again / "run" / "final")
        shutil.rmtree(again / "run" / "checkpoints" / "step_000003")
        as_many = (before, ranks) == ("two", 2)
        run(ranks, command, again, folder / "none.pkl" if as_many else third, *extra)  # none: the engines draw anew
        if as_many:
            found = load_file(again / "run/final/model.safetensors")
            assert all(torch.equal(found[name], reference[name]) for name in reference)
        else:
            assert_same_training(folder / "one", again, TOY / "model")


def test_a_signal_to_every_rank(tmp_path):
    """As srun sends it, at different moments: all save the same step and end with 128 + 10."""
    command = [*SMALL_RUN, *RARELY, "--output-dir", str(tmp_path), "--lora-r", "0", "--num-steps", "400"]
    log = tmp_path / "run" / "metrics.jsonl"

    processes = [training(command=command, env=environment) for environment in environments(2)]
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    processes[0].send_signal(signal.SIGUSR1)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGUSR1] * 2, outputs
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert len(list(saved.glob("__*.distcp"))) == 2  # a shard of each rank
    done = int(saved.name.removeprefix("step_"))
    assert records(tmp_path)[-1]["step"] == done and f"stopped after step {done}" in outputs[0]
    assert "stopped after" not in outputs[1]


def test_adapters_off_in_the_first_pass_of_bf16_ranks(tmp_path):
    """Mixed precision as on GPUs: FSDP settles gradient dtypes in its first pass, which must not be the reference's."""
    source = (ROOT / "grpo_upskill.py").read_text()
    on_a_cpu = '        if DEVICE.type == "cpu":\n            precision ='
    assert source.count(on_a_cpu) == 1
    source = source.replace(on_a_cpu, "        if False:\n            precision =")
    source = source.replace("else np.flatnonzero(~varied)", "else np.flatnonzero(varied & ~varied)")  # none is scored
    (tmp_path / "grpo_bf16.py").write_text(source)
    command = [*SMALL_RUN, *RARELY, "--lora-r", "4", "--skill-prefix", "", "--alpha-mi", "0", "--kl-coef", "0.1"]
    command = [*LAUNCH, str(tmp_path / "grpo_bf16.py"), *command[2:], "--num-steps", "2", "--max-logp-diff", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [
        *command,
        "--output-dir",
        str(tmp_path),
        "--save-every",
        "1",
        "--correct-coef",
        "1",
        "--answer-mode",
        "strict",
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [record for record in records(tmp_path) if "global_step" in record]
    assert len(steps) == 2 and all(0 < record["losses/grad_norm"] < 100 for record in steps)


def test_rows_of_all_ranks(monkeypatch):
    """Every row on one rank, as many batches on each, none over its limit or with many pads; in one process too."""
    generator = torch.Generator().manual_seed(1)
    for world in (1, 2, 3, 8):
        for rows in (1, 2, 5, 64):
            lengths = torch.randint(1, 60, (rows,), generator=generator).tolist()
            monkeypatch.setattr(grpo_upskill, "WORLD_SIZE", world)
            shares = []
            for rank in range(world):
                monkeypatch.setattr(grpo_upskill, "RANK", rank)
                shares.append(micro_batches(lengths, 100))
            assert len({len(share) for share in shares}) == 1
            assert sorted(i for share in shares for batch in share for i in batch) == list(range(rows))
            assert all(len(batch) * max([lengths[i] for i in batch], default=0) <= 100 for s in shares for batch in s)
            assert all(batch for share in shares for batch in share[:-1])  # only the last may be empty
            if world == 1:
                for batch, following in zip(shares[0], shares[0][1:]):
                    assert lengths[following[0]] <= lengths[batch[-1]]
                    filled = [
                        lengths[i] for i in [*batch, following[0]]
                    ]  # one more row would be too many, or too short
                    assert len(filled) * max(filled) > 100 or sum(filled) < 0.9 * len(filled) * max(filled)


def test_a_batch_without_rows_changes_nothing():
    policy = Policy(str(TOY / "model"), torch.float32, 0, 0)
    logps = policy(*pad_batch([], [], 0), 1.0)
    assert logps.shape == (1, 0)
    logps.sum().backward()  # the backward pass runs, as other ranks wait for its gathers
    gradients = [parameter.grad for parameter in policy.parameters()]
    assert all(gradient is None or not gradient.any() for gradient in gradients)
    assert sum(gradient is not None for gradient in gradients) > 30


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora_r", [0, 2])
def test_checkpoint_of_one_process(tmp_path, tied, lora_r):
    """Weights, moments and state come back; of LoRA's base there is no copy; no step is made by saving or loading."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(**sizes, vocab_size=500, num_hidden_layers=1, tie_word_embeddings=tied)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "model")

    def start():
        policy = Policy(str(tmp_path / "model"), torch.float32, lora_r, 16)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        return policy, torch.optim.AdamW(trained, 1e-2)

    folder = tmp_path / "checkpoints"
    policy, optimizer = start()
    inputs = pad_batch([[5, 6]], [[7, 8, 9]], 0)
    for step in (999_999, 1_000_000):  # from 1,000,000 on names are no longer in the order of the alphabet
        policy(*inputs, 1.0).sum().backward()
        optimizer.step()
        save_checkpoint(folder, policy, optimizer, {"step": step, "logp_limit": 1e-4})
    assert [path.name for path in checkpoints(folder)] == ["step_999999", "step_1000000"]
    other, again = start()
    state = load_checkpoint(checkpoints(folder)[-1], other, again)
    assert state["step"] == 1_000_000 and state["logp_limit"] == 1e-4
    pairs = list(zip(optimizer.param_groups[0]["params"], again.param_groups[0]["params"]))
    for mine, loaded in pairs:
        assert torch.equal(mine, loaded)
        for key, value in optimizer.state[mine].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.state[loaded][key])), key
    weights = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    size = sum(path.stat().st_size for path in checkpoints(folder)[-1].glob("*.distcp"))
    assert 12 * weights < size < 12 * weights + 4 * len(pairs) * 2000  # weights and two moments, once; headers

    damaged = next(checkpoints(folder)[-1].glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="step_1000000 cannot be read; delete it, and the run goes on from"):
        load_checkpoint(checkpoints(folder)[-1], *start())
    (checkpoints(folder)[-1] / "state.json").write_text("")
    with pytest.raises(SystemExit, match="step_1000000 cannot be read"):
        load_checkpoint(checkpoints(folder)[-1], *start())
