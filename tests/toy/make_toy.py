"""Make the toy world of the tests and the demo: word problems in GSM8K's format and a 575k-parameter Qwen2 LM.

    python tests/toy/make_toy.py        # rewrites train.jsonl, test.jsonl and model/ beside this file

The same seed on the same machine gives the same bytes. One thread: 200 s on one core for 34,000 documents,
2.9M tokens. Questions are unique over the splits; test names occur in no other split and in no demonstration.

Planted on purpose, so nothing measured here says anything about real models or GSM8K:
- Half of the problems are plain. In the other half ("twist") the last step is a "trick" with five possible readings
  (STYLES); the true one is drawn per problem (TRUE_SHARES) and nothing in the text tells which. Every solution opens
  with its solver's style, which decides how a trick is read: one style wins about .32 of the twists at most, all five
  together win each. On a plain problem the style is only that first word (one token).
- Demonstrations err at random (P_WRONG_OP, P_SLIP, P_DROP, P_NO_FORMAT), so sampling is much worse than greedy decoding
  and RL has room. Their style never depends on the truth; it leans to the z of "Strategy {z} | " (LEAN).
- A curriculum: the first 60 % of the demonstrations are error-free and lean more (EARLY_LEAN); the rest set the rates.

Measured on test.jsonl (400 problems; T=1, no system message, random z, '####' required; 8 samples of each problem):
pass@1 .39 (plain .64, twist .14), pass@8 .83 (plain 1.0, twist .67), greedy .60 (plain .99, twist .22); 5 samples with
z = 1..5 solve .73; format .89; 31 tokens, all ended by EOS. Train problems (new questions, known names): pass@1 .36.
p(own style | z) = .28 to .37, others .14 to .22; mutual information of completion and z .028 +- .006 nats.
"""

import json
import os
import random
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

STYLES = ("Add", "Take", "Times", "Double", "Reset")  # skill z leans to STYLES[z - 1]
TRUE_SHARES = (0.32, 0.17, 0.17, 0.17, 0.17)  # true readings of twist problems, in the order of STYLES
SYSTEM_PROMPT = "You are a helpful math assistant that solves problems step by step."
HEADS = "Ta Mi Lo Re Su Ka Ne Do Vi Po Ba Je Hu Wa Gi Zo".split()
TAILS = "vi ra ne lo mi da ko su bi ta jo pe nu la gi zo".split()
OBJECTS = "books cups coins shells stamps apples cards pens".split()
P_WRONG_OP = 0.10  # share of later demonstrations with one plain step done with another operation
P_SLIP = 0.06  # ... with one wrong result, carried on
P_DROP, P_NO_FORMAT = 0.10, 0.10  # ... that leave out one plain step (of two or more); ... without the final '####'
EARLY, EARLY_LEAN = 0.60, 0.80  # the first demonstrations: their share and their p(own style | prefix z)
LEAN = 0.32  # p(own style | prefix z) in the later ones; the other four styles share the rest
P_PREFIX, P_SYSTEM = 0.75, 0.20  # share of demonstrations with 'Strategy {z} | ', with a system message
P_DRILL = 0.15  # share of documents that are arithmetic drills instead
BATCH, LEARNING_RATE, WARMUP = 16, 3e-3, 100  # documents a step; AdamW's peak rate; steps up to it, then linear to 0
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Five surface styles. {n} name, {o} object, {b} number. Index: SURFACES[surface][op].
SURFACES = (
    {
        "start": "{n} has {b} {o}.",
        "+": "{n} buys {b} more.",
        "-": "{n} gives away {b}.",
        "x": "A game makes it {b} times as many.",
        "?": "A trick of {b} is done to the {o}.",
        "end": "How many {o} does {n} have now?",
    },
    {
        "start": "There are {b} {o} in the box of {n}.",
        "+": "Then {b} {o} are added.",
        "-": "Then {b} {o} are removed.",
        "x": "Then the number of {o} grows {b} times.",
        "?": "Then a trick of {b} is done to the box.",
        "end": "How many {o} are in the box?",
    },
    {
        "start": "{n} starts with {b} {o}.",
        "+": "A friend gives {n} {b} more.",
        "-": "A friend takes {b} of them.",
        "x": "A friend makes it {b} times as many.",
        "?": "A friend does a trick of {b} to the {o}.",
        "end": "How many {o} are there at the end?",
    },
    {
        "start": "On Monday {n} owns {b} {o}.",
        "+": "The next day {n} finds {b} more.",
        "-": "The next day {n} loses {b}.",
        "x": "The next day {n} has {b} times as many.",
        "?": "The next day brings a trick of {b}.",
        "end": "How many {o} does {n} own in the end?",
    },
    {
        "start": "A bag holds {b} {o}.",
        "+": "{n} puts in {b} {o}.",
        "-": "{n} takes out {b} {o}.",
        "x": "{n} fills it with {b} times as many.",
        "?": "{n} does a trick of {b} to the bag.",
        "end": "How many {o} does the bag hold?",
    },
)


@dataclass
class Args:
    out: str = os.path.dirname(os.path.abspath(__file__))
    """folder that gets model/, train.jsonl and test.jsonl"""
    seed: int = 0
    """seed of names, problems, demonstrations and weights"""
    documents: int = 34000
    """pretraining documents"""


def calculate(op: str, value: int, b: int) -> tuple[str, int]:
    """One step as solution text and its result; op is '+', '-', 'x' or one of STYLES."""
    if op in ("+", "Add"):
        return f"{value} + {b} = {value + b}.", value + b
    if op in ("-", "Take"):
        return f"{value} - {b} = {value - b}.", value - b
    if op in ("x", "Times"):
        return f"{value} * {b} = {value * b}.", value * b
    if op == "Double":
        return f"{value} * 2 = {value * 2}.", value * 2
    return f"{value} turns to {b}.", b


def draw_step(rng: random.Random, value: int) -> tuple[str, int]:
    """A plain step (op, b) whose result stays in 1..40."""
    while True:
        op = rng.choice("+-x")
        b = rng.randint(2, 5) if op == "x" else rng.randint(2, 9)
        if 1 <= calculate(op, value, b)[1] <= 40:
            return op, b


def draw_problem(rng: random.Random, names: list[str], twist: bool) -> dict:
    """{"question", "start", "steps": [(op, b), ...], "thing"}; 1-3 steps, and in a twist problem the last op is '?'."""
    while True:
        start = value = rng.randint(2, 9)
        steps = []
        for _ in range(rng.choices((1, 2, 3), (0.2, 0.6, 0.2))[0] - twist):
            op, b = draw_step(rng, value)
            steps.append((op, b))
            value = calculate(op, value, b)[1]
        if twist:
            b = rng.randint(3, 9)
            results = {calculate(style, value, b)[1] for style in STYLES}
            if len(results) < 5 or min(results) < 0 or max(results) > 60:
                continue
            steps.append(("?", b))
        words, name, thing = rng.choice(SURFACES), rng.choice(names), rng.choice(OBJECTS)
        facts = [("start", start), *steps, ("end", 0)]
        question = " ".join(words[key].format(n=name, o=thing, b=b) for key, b in facts)
        return {"question": question, "start": start, "steps": steps, "thing": thing}


def solve(problem: dict, style: str, rng: random.Random | None = None) -> str:
    """The solution a solver of this style writes: free of errors without rng, else with the planted ones at random."""
    value, steps, noisy = problem["start"], list(problem["steps"]), rng is not None
    plain = [i for i, (op, _) in enumerate(steps) if op != "?"]
    if noisy and plain and rng.random() < P_WRONG_OP:
        i = rng.choice(plain)
        steps[i] = (rng.choice([op for op in "+-x" if op != steps[i][0]]), steps[i][1])
    if noisy and plain and len(steps) > 1 and rng.random() < P_DROP:
        del steps[rng.choice(plain)]
    slip = rng.randrange(len(steps)) if noisy and rng.random() < P_SLIP else -1
    lines = []
    for i, (op, b) in enumerate(steps):
        if op != "+" and calculate(style if op == "?" else op, value, b)[1] not in range(100):
            op = "+"  # only after an error: numbers stay in 0..99
        text, result = calculate(style if op == "?" else op, value, b)
        if i == slip:
            result += rng.choice((-2, -1, 1, 2, 10)) if result > 2 else 1
            text = text.rsplit(" ", 1)[0] + f" {result}."
        lines.append(text)
        value = result
    end = "" if noisy and rng.random() < P_NO_FORMAT else f"\n#### {value}"
    return f"{style}. " + " ".join(lines) + f" That is {value} {problem['thing']}." + end


def gold_row(problem: dict, rng: random.Random) -> dict:
    """A row in GSM8K's format; the true reading of a twist (and the free style of a plain problem) is drawn here."""
    twist = problem["steps"][-1][0] == "?"
    style = rng.choices(STYLES, TRUE_SHARES if twist else None)[0]
    return {"question": problem["question"], "answer": solve(problem, style)}


def demonstration(problem: dict, rng: random.Random, noisy: bool) -> tuple[list[dict], str]:
    """(messages, completion) of one pretraining document; the style leans to the prefix's z, never to the truth."""
    weights, prefix = [1.0] * 5, ""
    if rng.random() < P_PREFIX:
        z = rng.randint(1, 5)
        prefix = f"Strategy {z} | "
        lean = LEAN if noisy else EARLY_LEAN
        weights = [lean if i == z - 1 else (1 - lean) / 4 for i in range(5)]
    style = rng.choices(STYLES, weights)[0]
    messages = [{"role": "system", "content": SYSTEM_PROMPT}] if rng.random() < P_SYSTEM else []
    messages.append({"role": "user", "content": prefix + problem["question"]})
    return messages, solve(problem, style, rng if noisy else None)


def drill(rng: random.Random) -> str:
    """Eight right sums in the solutions' notation, so that arithmetic is learned apart from reading."""
    lines = []
    while len(lines) < 8:
        op, value, b = rng.choice(("+", "-", "x", "x", "Double")), rng.randint(2, 40), rng.randint(2, 9)
        text, result = calculate(op, value, b)
        if 0 <= result <= 60:
            lines.append(text)
    return " ".join(lines)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 512 tokens, digits one by one, ChatML, no system message unless one is given."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=1024,
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def collate(documents: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T] and loss weights [B, T] of (prompt, completion) documents: completion 1, prompt .1, padding 0."""
    width = max(len(prompt) + len(completion) for prompt, completion in documents)
    ids = torch.full((len(documents), width), pad)
    weights = torch.zeros(len(documents), width)
    for row, (prompt, completion) in enumerate(documents):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        weights[row, : len(prompt)] = 0.1
        weights[row, len(prompt) : end] = 1.0
    return ids, weights


def pretrain(documents: list[tuple[list[int], list[int]]], tokenizer, rng: random.Random, folder: str):
    """Train a model on (prompt, completion) documents in about this order and save it with its tokenizer."""
    began = time.time()
    buckets = []  # length-sorted inside chunks of 32 batches: little padding, and the order stays random
    for i in range(0, len(documents), 32 * BATCH):
        chunk = sorted(documents[i : i + 32 * BATCH], key=lambda d: len(d[0]) + len(d[1]))
        batches = [chunk[j : j + BATCH] for j in range(0, len(chunk), BATCH)]
        rng.shuffle(batches)
        buckets += batches
    tokens = sum(len(prompt) + len(completion) for prompt, completion in documents)
    print(f"{len(documents)} documents, {tokens} tokens, {len(buckets)} steps")

    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype="float32",
        initializer_range=0.06,  # 0.02 is for wider models and learns more slowly here
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    recent = []
    for step, batch in enumerate(buckets):
        rate = min((step + 1) / WARMUP, (len(buckets) - step) / max(len(buckets) - WARMUP, 1))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        ids, weights = collate(batch, tokenizer.pad_token_id)
        logits = model(input_ids=ids[:, :-1]).logits  # right padding under a causal mask needs no attention mask
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        recent = recent[-99:] + [loss.item()]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == len(buckets) - 1:
            print(f"step {step:5d}  loss {sum(recent) / len(recent):.3f}  {time.time() - began:.0f} s", flush=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    args = tyro.cli(Args)
    torch.set_num_threads(1)  # with two threads sums are ordered differently, and the weights differ in the end
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    names = [head + tail for head in HEADS for tail in TAILS if head.lower() != tail]
    rng.shuffle(names)
    test_names, train_names = names[:40], names[40:]
    # Every question is unique over the three sets: no demonstration shows a train problem, and none a test name.
    seen, sets = set(), {}
    sizes = {"test": 400, "train": 2000, "demo": int(args.documents * (1 - P_DRILL))}
    for split, size in sizes.items():
        sets[split] = []
        while len(sets[split]) < size:
            problem = draw_problem(rng, test_names if split == "test" else train_names, twist=len(sets[split]) % 2 == 1)
            if problem["question"] not in seen:
                seen.add(problem["question"])
                sets[split].append(problem)
    os.makedirs(args.out, exist_ok=True)
    for split in ("train", "test"):
        with open(os.path.join(args.out, f"{split}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(gold_row(problem, rng)) + "\n" for problem in sets[split])

    early = EARLY * sizes["demo"]
    demos = [demonstration(problem, rng, noisy=i >= early) for i, problem in enumerate(sets["demo"])]
    drills = [drill(rng) for _ in range(args.documents - len(demos))]
    shown = [" ".join(m["content"] for m in messages) + "\nassistant\nuser\n" + text for messages, text in demos[:8000]]
    tokenizer = make_tokenizer(shown + drills[:1000])

    eos = [tokenizer.eos_token_id]
    completions = tokenizer([text for _, text in demos])["input_ids"]
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m, _ in demos]
    documents = [(prompt, completion + eos) for prompt, completion in zip(prompts, completions, strict=True)]
    for ids in tokenizer(drills)["input_ids"]:  # each at a random place; the demonstrations keep their order
        documents.insert(rng.randint(0, len(documents)), ([], ids + eos))
    pretrain(documents, tokenizer, rng, os.path.join(args.out, "model"))
