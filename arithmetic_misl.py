"""UpSkill's arithmetic study of mutual-information skill learning (Shah et al. 2026, arXiv 2602.22296, section 5.1,
figure 4, appendices E.6 and F).

A problem x is three digits. An answer y is "digit operator digit": it is right if its value, cut to a whole number, is
one of the three digits, and its operands are the other two. A skill z in 0..N-1 is the first token of the prompt. A
small transformer imitates solutions for 100 steps. Then it learns by REINFORCE from C answers to each problem and its
one random z:

    r(y; x, z) = r_correct + r_MI,                   r_correct = 1 right, 0 wrong
    r_MI       = clip(alpha log p(y | x, z) - beta log (1/N) sum_z' p(y | x, z'), -cap, cap)
    A_i        = r_i - mean r of the C answers

With beta = alpha, without the clip, and at sampling temperature 1, the mean of r_MI is alpha I(y; z | x). Four arms are
compared:

    grpo       r_correct alone
    mi         the paper's: r_correct + r_MI
    pass-k     r_correct alone; an answer's advantage is what it adds to the best of the C answers
    gated-mi   pass-k, and r_MI of right answers only, never below 0, minus its mean; its weight is --gated-alpha

Every arm and seed is a policy of its own. All of them train in turn, an update each, so that they can be compared at
any time. An evaluation enumerates all problems and all 500 answers, so that its figures are exact expectations.

Plain torch on a CPU. Left out: the paper's token-level reward (only logged, as skill/mi_token), and the 24-game.
Results, and what the authors' own program gives, are in docs/arithmetic_misl.md.

    python arithmetic_misl.py                                     # all four arms, three seeds
    python arithmetic_misl.py --arms grpo mi --num-seeds 1        # the pair of figure 4, in minutes
"""

import copy
import fcntl
import json
import math
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from itertools import combinations, permutations, product
from operator import add, mod, mul, sub, truediv
from pathlib import Path
from typing import Literal

# Idle CPU threads go to sleep after some microseconds: busy waiting makes a shared CPU ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from eval_gsm8k import plain_error

OPERATORS = {"+": add, "-": sub, "*": mul, "/": truediv, "%": mod}
VOCABULARY = 15  # tokens: ten digits, then the five operators; a skill's token is its digit
STAR = 12  # the prompt's separator is the token of "*"
PROMPT_LEN = 8  # tokens of a prompt: z * a * b * c *
WIDTH, HEADS, LAYERS, POSITIONS = 128, 4, 2, 64  # the original's sizes; 10 positions are used
# Shapes: P problems, B problems of an update (inside the policy: token rows), N skills, C answers to a problem and its
# z, T tokens of a prompt and its answers, V the vocabulary.

Arm = Literal["grpo", "mi", "pass-k", "gated-mi"]


@dataclass
class Args:
    # experiment
    run_name: str = ""  # folder under output_dir; the same name again resumes it (empty: script, seed, time)
    output_dir: str = "runs"  # where run folders are made
    arms: tuple[Arm, ...] = ("grpo", "mi", "pass-k", "gated-mi")  # what is trained and compared, see above
    seed: int = 0  # the first seed; all random numbers are computed from the seed and the step
    num_seeds: int = 3  # seeds of each arm: seed, seed + 1, ..
    # imitation
    imitation_steps: int = 100  # steps of imitating solutions before the first update; the original's warm-up
    # rollout
    num_steps: int = 2000  # updates of every policy
    questions_per_step: int = 32  # problems in an update, each with one skill
    group_size: int = 5  # answers C to a problem and its skill, which are compared with each other
    temperature: float = 0.9  # of sampling, gradient and evaluation (skill/mi too); the MI reward and the KL are at 1
    # UpSkill
    max_z: int = 5  # number of skills N
    alpha: float = 0.5  # arm mi: weight of log p(y | x, z)
    beta: float | None = None  # arm mi: weight of log (1/N) sum_z' p(y | x, z'); None: as alpha
    cap: float = 1.0  # the MI reward is clipped to [-cap, cap]
    gated_alpha: float = 0.2  # arm gated-mi: alpha and beta
    gated_advantage: Literal["mean", "pass-k"] = "pass-k"  # arm gated-mi: how r_correct becomes an advantage
    # loss
    kl_coef: float = 0.0  # weight of KL(policy || the policy after imitation), every arm; appendix F has 0.05
    # optimizer
    lr: float = 5e-4  # constant, the same in both phases
    max_grad_norm: float = 1.0  # gradient norm clip, of each policy by itself
    # evaluation and checkpoint
    eval_every: int = 400  # evaluate every so many updates, besides the start and the end
    save_every: int = 200  # write the checkpoint every so many updates, besides the end


# ---- Reward and loss -------------------------------------------------------------------------------------------------
def misl_rewards(logps, alpha: float, beta: float, cap: float):
    """clip(alpha log p(y | x, z) - beta log (1/N) sum_z' p(y | x, z'), -cap, cap), [B, C].

    logps [B, N, C]: log p(y | x, z') under every skill; the first is the one that sampled.
    """
    own = logps[:, 0]  # [B, C]
    mixture = logps.logsumexp(1) - math.log(logps.shape[1])  # [B, C]
    return (alpha * own - beta * mixture).clamp(-cap, cap)


def mean_advantages(rewards):
    """r_i - mean_j r_j within each group; rewards [B, C]."""
    return rewards - rewards.mean(1, keepdim=True)


def pass_k_advantages(rewards):
    """What each of C answers adds to the best of its group: max_j r_j - max_{j != i} r_j; rewards [B, C].

    In expectation it gives the gradient of pass@C.
    """
    second_best = rewards.topk(2, 1).values[:, 1:]
    return (rewards - second_best).clamp(min=0)


def arm_advantages(r_correct, r_mi, pass_k: bool, gated: bool):
    """Advantages [B, C] within the C answers of a group; r_correct, r_mi [B, C].

    r_MI has the group's mean subtracted. So has r_correct, unless pass_k. Where gated, wrong answers get r_MI = 0, and
    negative values become 0: otherwise a right answer could rank below a wrong one.
    """
    if gated:
        r_mi = r_mi.clamp(min=0) * r_correct
    if pass_k:
        return pass_k_advantages(r_correct) + mean_advantages(r_mi)
    return mean_advantages(r_correct) + mean_advantages(r_mi)


def exact_kl(branches, reference_branches):
    """KL(policy || reference) over all tokens at each of an answer's three places, summed: [B, C], of branch_logps."""
    left, operator, right = [
        (p.exp() * (p - q)).sum(-1) for p, q in zip(branches, reference_branches, strict=True)
    ]  # [B], [B, C], [B, C]
    return left[:, None] + operator + right


# ---- The task --------------------------------------------------------------------------------------------------------
def calculate(left: int, operator: str, right: int) -> float | None:
    """left operator right, by true division and Python's modulo; None if that divides by 0."""
    if operator in "/%" and right == 0:
        return None
    return OPERATORS[operator](left, right)


def first_solution(digits) -> list[int]:
    """The answer to imitate, [left, operator, right]: the first exact one by target digit, operand order, operator."""
    for k in range(3):
        first, second = digits[:k] + digits[k + 1 :]
        for left, right in (first, second), (second, first):
            for index, operator in enumerate(OPERATORS):
                if calculate(left, operator, right) == digits[k]:
                    return [left, index, right]


def arithmetic_problems():
    """Every problem, its chance, its right answers, and the answer to imitate.

    The authors' generator draws x, operator, y uniformly until v = x operator y is a whole number in 0..9, and shuffles
    (x, y, v). Its checker cuts values to whole numbers, so that 7/2 counts as 3.
    Returns digits [P, 3]; chance [P] double; correct [P, 500] bool, where the index of an answer is
    50 left + 10 operator + right; solution [P, 3], see first_solution.
    """
    answers = list(product(range(10), OPERATORS, range(10)))
    values = [calculate(*answer) for answer in answers]
    counts = Counter()
    for (x, _, y), value in zip(answers, values, strict=True):
        if value in range(10):  # neither a fraction nor None
            counts.update(permutations((x, y, int(value))))
    problems = sorted(counts)

    correct = np.zeros((len(problems), len(answers)), dtype=bool)
    for column, (left, _, right) in enumerate(answers):
        if values[column] is None:
            continue
        needed = sorted((left, right, int(values[column])))
        correct[:, column] = [needed == sorted(digits) for digits in problems]

    chance = torch.tensor([counts[digits] for digits in problems]).double()
    solution = torch.tensor([first_solution(digits) for digits in problems])
    return torch.tensor(problems), chance / chance.sum(), torch.tensor(correct), solution


def draw(seed: int, step: int, purpose: int, chance, args):
    """A step's problems [B], as rows, skills z [B] and Gumbel noise [B, C, 25], for an answer's 10 + 5 + 10 tokens.

    purpose: 0 imitation, 1 reinforcement. They follow from the seed, the step and the purpose, so all arms of a seed
    get the same problems, skills and noise. chance [P].
    """
    B, C = args.questions_per_step, args.group_size
    rng = np.random.default_rng([seed, step, purpose])
    problems = torch.tensor(rng.choice(len(chance), B, p=chance))
    skills = torch.tensor(rng.integers(args.max_z, size=B))
    noise = torch.tensor(rng.gumbel(size=(B, C, 25)))
    return problems, skills, noise.float()


def make_prompts(digits, z):
    """Tokens [.., 8] of the prompts "z * a * b * c *"; digits [.., 3], z [..]."""
    prompts = torch.full((*z.shape, PROMPT_LEN), STAR)
    prompts[..., 0] = z
    prompts[..., 2::2] = digits
    return prompts


# ---- Policy and log-probabilities ------------------------------------------------------------------------------------
class Layer(nn.Module):
    """Attention and MLP of a pre-norm transformer, without dropout."""

    def __init__(self):
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, mask, first: int):
        """x [B, T, WIDTH] to [B, T - first, WIDTH], the tokens from `first` on; mask [T, T]: see answer_tree."""
        B, T, _ = x.shape
        D = WIDTH // HEADS
        qkv = self.qkv(self.norm_1(x)).view(B, T, 3, HEADS, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, HEADS, T, D]
        q = q[:, :, first:]
        scores = q @ k.mT / math.sqrt(D) + mask[first:]  # [B, HEADS, T - first, T]
        attended = scores.softmax(-1) @ v
        attended = attended.transpose(1, 2).flatten(2)  # [B, T - first, WIDTH]
        x = x[:, first:] + self.out(attended)
        hidden = F.gelu(self.up(self.norm_2(x)))
        return x + self.down(hidden)


class Transformer(nn.Module):
    """One decoder-only policy of 407,808 parameters, with PyTorch's default initial weights."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens, tree):
        """Logits [B, 1 + lefts + operators, V] from the prompt's last token on; tokens [B, T], tree: see answer_tree.

        Where the tokens end before the tree does, only its beginning is read.
        """
        T = tokens.shape[1]
        positions, mask = tree[0][:T], tree[1][:T, :T]
        x = self.tokens(tokens) + self.positions(positions)  # [B, T, WIDTH]
        for layer in self.layers[:-1]:
            x = layer(x, mask, first=0)
        x = self.layers[-1](x, mask, first=PROMPT_LEN - 1)  # nothing reads what comes out of the prompt's other tokens
        return self.head(self.norm(x))


def answer_tree(num_lefts: int, num_operators: int):
    """Positions [T] and mask [T, T] of a prompt with many answers behind it, which share its 8 tokens.

        4 * 2 * 3 * 6 *       the prompt "z * a * b * c *": every token sees those before it
         |     |     |
         6     2     6        left digits: each sees the prompt and itself
         |     |     |
         /     *     -        operators, num_operators behind each left digit: each sees the prompt, its left digit
                              and itself. The right digit is predicted there, and never read.

    T = 8 + num_lefts + num_lefts * num_operators. Three answers take 14 tokens, not 30, and all 500 take 68, not 5,000.
    The mask is 0 where a token (row) sees a token (column), else -inf.
    """
    parents = torch.arange(num_lefts).repeat_interleave(num_operators)  # which left digit an operator stands behind
    positions = torch.tensor([*range(PROMPT_LEN), *[PROMPT_LEN] * num_lefts, *[PROMPT_LEN + 1] * len(parents)])
    T = len(positions)
    sees = torch.eye(T)
    sees[:, :PROMPT_LEN] = torch.ones(T, PROMPT_LEN).tril()
    sees[torch.arange(PROMPT_LEN + num_lefts, T), PROMPT_LEN + parents] = 1
    return positions, torch.where(sees.bool(), 0.0, -math.inf)


def branch_logps(logits, num_lefts: int, temperature: float):
    """log p(left) [.., 10], log p(operator | left) [.., lefts, 5], log p(right | left, operator) [.., operators, 10].

    logits [.., 1 + lefts + operators, V] of an answer tree. Digits compete with digits only, operators with operators.
    """
    logits = logits / temperature
    left = logits[..., 0, :10]
    operator = logits[..., 1 : 1 + num_lefts, 10:]
    right = logits[..., 1 + num_lefts :, :10]
    return left.log_softmax(-1), operator.log_softmax(-1), right.log_softmax(-1)


def answer_logps(branches, answers):
    """log p(y | x, z) [.., C] of answers [.., C, 3] = (left, operator, right); answer i stands on left digit i."""
    left, operator, right = branches
    left = left.gather(-1, answers[..., 0])
    operator = operator.gather(-1, answers[..., 1:2])
    right = right.gather(-1, answers[..., 2:])
    return left + operator[..., 0] + right[..., 0]


def sample_answers(model, prompts, noise, temperature: float, tree):
    """C answers to every prompt [B, 8]: their tokens with the prompt, the answers, and the logits of the last pass.

    A token is argmax(logits / temperature + Gumbel noise), which is a draw from the softmax; noise [B, C, 25].
    There are three passes, over 8, 8 + C and 8 + 2C tokens. The last has a gradient: it samples the right digits, and
    it is also the pass that trains. Returns tokens [B, 8 + 2C], answers [B, C, 3], logits [B, 1 + 2C, V].
    """
    C = noise.shape[1]
    noise_left, noise_operator, noise_right = noise.split((10, 5, 10), -1)
    with torch.no_grad():
        logits = model(prompts, tree)
        left = (logits[:, :, :10] / temperature + noise_left).argmax(-1)  # [B, C]
        tokens = torch.cat([prompts, left], -1)
        logits = model(tokens, tree)
        operator = (logits[:, 1:, 10:] / temperature + noise_operator).argmax(-1)
        tokens = torch.cat([tokens, 10 + operator], -1)
    logits = model(tokens, tree)
    right = (logits[:, 1 + C :, :10] / temperature + noise_right).argmax(-1)
    return tokens, torch.stack([left, operator, right], -1), logits


@torch.no_grad()
def skill_logps(model, tokens, answers, logits, num_skills: int, tree):
    """log p(y | x, z') [B, N, C] under every skill z', at temperature 1; the skill that sampled comes first.

    tokens, answers, logits: see sample_answers. The logits are the sampling skill's own; one pass scores the others.
    """
    C = answers.shape[1]
    own = answer_logps(branch_logps(logits, C, 1.0), answers)  # [B, C]
    others = tokens[:, None].repeat(1, num_skills - 1, 1)  # [B, N - 1, T]
    others[..., 0] = (others[..., 0] + torch.arange(1, num_skills)) % num_skills  # the first token is z
    logits = model(others.flatten(0, 1), tree)  # [B (N - 1), 1 + 2C, V]
    answers = answers.repeat_interleave(num_skills - 1, 0)
    logps = answer_logps(branch_logps(logits, C, 1.0), answers)  # [B (N - 1), C]
    return torch.cat([own[:, None], logps.unflatten(0, (-1, num_skills - 1))], 1)


def update(model, optimizer, loss, max_grad_norm: float, policy) -> float:
    """One optimizer step. Returns the gradient norm before it is clipped; policy: (arm, seed)."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    if not math.isfinite(norm):
        arm, seed = policy
        sys.exit(f"error: the gradient norm of arm {arm}, seed {seed} is {norm}; lower --lr or a weight in a new run.")
    optimizer.step()
    return norm


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def log_ratio(logps):
    """log p(y | z) - log (1/N) sum_z' p(y | z') of logps [P, N, ..]."""
    return logps - logps.logsumexp(1, keepdim=True) + math.log(logps.shape[1])


def exact_figures(branches, correct) -> dict[str, torch.Tensor]:
    """{key: [P]}: expectations over one answer of a random skill, by all 500 answers.

    branches [P, N, 10], [P, N, 10, 5], [P, N, 50, 10]: of the tree of all answers; correct [P, 500].

    eval/pass@N       chance that one answer of each of the N skills holds a right one
    eval/iid_pass@N   that N answers of random skills do
    skill/mi          I(y; z | x) = E log [p(y | x, z) / mixture], mixture = (1/N) sum_z' p(y | x, z'); at most ln N
    skill/mi_token    the paper's: the same log ratio of every token given those before it, summed; never less than I
    skill/mi_correct  I(correctness; z | x): information about being right; without it pass@N equals iid_pass@N
    skill/z_decoded   chance to name the skill from the answer, by guessing the likeliest one
    skill/accuracy    [P, N]; skill/operators [P, N, 5]: how often a skill uses each
    """
    left, operator, right = [branch.double() for branch in branches]
    right = right.unflatten(-2, (10, 5))  # [P, N, 10, 5, 10]
    pairs = left[..., None] + operator  # [P, N, 10, 5]
    logps = (pairs[..., None] + right).flatten(2)  # [P, N, 500]
    p = logps.exp()
    N = p.shape[1]
    accuracy = (p * correct[:, None]).sum(-1)  # [P, N]
    pass_1 = accuracy.mean(-1)  # [P]

    pair_ratios = log_ratio(left)[..., None] + log_ratio(operator)
    token_ratios = (pair_ratios[..., None] + log_ratio(right)).flatten(2)  # [P, N, 500]
    outcomes = torch.stack([accuracy, 1 - accuracy], -1).clamp(min=1e-300)  # [P, N, 2]
    return {
        "eval/pass@1": pass_1,
        f"eval/pass@{N}": 1 - (1 - accuracy).prod(-1),
        f"eval/iid_pass@{N}": 1 - (1 - pass_1) ** N,
        "eval/entropy": -(p * logps).sum(-1).mean(-1),
        "skill/mi": (p * log_ratio(logps)).sum(-1).mean(-1),
        "skill/mi_token": (p * token_ratios).sum(-1).mean(-1),
        "skill/mi_correct": (outcomes * log_ratio(outcomes.log())).sum(-1).mean(-1),
        "skill/z_decoded": p.amax(1).sum(-1) / N,
        "skill/accuracy": accuracy,
        "skill/operators": pairs.exp().sum(-2),
    }


@torch.no_grad()
def evaluate_exactly(model, digits, correct, chance, num_skills: int, temperature: float) -> dict[str, list]:
    """{key: number or list}: exact_figures, averaged over problems; digits [P, 3], correct [P, 500], chance [P]."""
    tree = answer_tree(10, 5)
    answers = torch.tensor([*range(10), *[*range(10, VOCABULARY)] * 10])  # the tree's tokens behind the prompt
    sums = defaultdict(float)
    for part in torch.arange(len(digits)).split(16):  # problems at a time
        skills = torch.arange(num_skills).repeat(len(part))  # [P N]
        prompts = make_prompts(digits[part].repeat_interleave(num_skills, 0), skills)
        tokens = torch.cat([prompts, answers.expand(len(prompts), -1)], -1)
        logits = model(tokens, tree).unflatten(0, (-1, num_skills))  # [P, N, 61, V]
        for key, figure in exact_figures(branch_logps(logits, 10, temperature), correct[part]).items():
            sums[key] += torch.einsum("p...,p->...", figure, chance[part])
    return {key: figure.tolist() for key, figure in sums.items()}


def interval(values) -> tuple[float, float]:
    """Mean of the values over seeds, and half the width of its 95 % t-interval; nan for a single seed."""
    from scipy import stats

    half = math.nan
    if len(values) > 1:
        half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values)), float(half)


def results_table(records: list[dict], arms: list[str], N: int) -> str:
    """One line for each arm, and for each pair of arms their difference, seed by seed; records: the last evaluation.

    A single seed has no interval.
    """
    keys = ["eval/pass@1", f"eval/pass@{N}", f"eval/iid_pass@{N}", "skill/mi", "skill/mi_token"]
    rows = {}
    for arm in arms:
        own = [record for record in records if record["arm"] == arm]
        rows[arm] = np.array([[record[key] for key in keys] for record in own])  # [seeds, keys]
    for first, second in combinations(arms, 2):
        rows[f"{second} - {first}"] = rows[second] - rows[first]

    table = f"{'mean, ± 95 % t-interval over seeds':<35}" + "".join(f"{key.split('/')[1]:>16}" for key in keys)
    for name, values in rows.items():
        table += f"\n{name:<35}"
        for column in values.T:
            mean, half = interval(column)
            table += f"{mean:>8.3f}" + ("        " if math.isnan(half) else f" ± {half:.3f}")
    return table


# ---- Arguments, run folder -------------------------------------------------------------------------------------------
def check_numbers(args, positive: str):
    """End the program if a number is out of range: all must be finite and at least 0, those in `positive` over 0."""
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, (int, float)) and not math.isfinite(value):
            sys.exit(f"error: {flag} is {value}; it must be a finite number.")
        if name in positive.split() and value <= 0:
            sys.exit(f"error: {flag} is {value}; it must be over 0.")
        if isinstance(value, (int, float)) and value < 0:
            sys.exit(f"error: {flag} is {value}; it must be at least 0.")


def open_run(args, run_dir: Path) -> str:
    """Make the run's folder and lock it. Returns "", or a sentence if this run cannot have it: then all ranks end.

    The same --run-name goes on where it stopped, with the same arguments: only `free` ones may differ.
    """
    free = "run_name output_dir track max_tokens_per_microbatch gpu_memory_utilization max_logp_diff save_every"
    path = run_dir / "args.json"
    try:
        if run_dir.exists() and set(os.listdir(run_dir)) - {"lock"} and not path.exists():
            return f"error: {run_dir} exists and holds no run; choose another --run-name."
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / "lock", os.O_CREAT | os.O_RDWR)  # open, and so locked, until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"error: another process runs {run_dir}; wait for its end, or choose another --run-name."
        except OSError:
            pass  # a file system without locks
        wanted = json.loads(json.dumps(asdict(args)))  # with lists for tuples, as the file has them
        before = json.loads(path.read_text()) if path.exists() else wanted
        for name, value in wanted.items():
            if name not in free.split() and before.get(name) != value:
                flag = f"--{name.replace('_', '-')}"
                return f"error: {flag} of {run_dir} was {before.get(name)!r}, not {value!r}; choose another --run-name."
        path.with_suffix(".tmp").write_text(json.dumps(asdict(args), indent=2))
        path.with_suffix(".tmp").rename(path)
    except (OSError, ValueError) as error:
        return f"error: {run_dir} cannot be used ({error}); choose another --output-dir or --run-name."
    return ""


# ---- The algorithm ---------------------------------------------------------------------------------------------------
if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)

    positive = "num_seeds num_steps questions_per_step temperature cap lr max_grad_norm eval_every save_every"
    check_numbers(args, positive)
    if not args.arms or len(set(args.arms)) < len(args.arms):
        sys.exit("error: --arms needs at least one arm, and none of them twice.")
    if args.group_size < 2:
        sys.exit(f"error: --group-size {args.group_size} must be at least 2: an answer is compared with its group.")
    if not 2 <= args.max_z <= 10:
        sys.exit(f"error: --max-z {args.max_z} must be 2 to 10: skills are compared, and a skill's token is one digit.")

    # run folder
    run_name = args.run_name or f"{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.output_dir) / run_name
    metrics_path, table_path = run_dir / "metrics.jsonl", run_dir / "table.txt"
    checkpoint_path = run_dir / "checkpoint.pt"
    refusal = open_run(args, run_dir)
    if refusal:
        sys.exit(refusal)
    if table_path.exists():
        print(f"{table_path.read_text()}\n{run_dir} is complete; another --run-name starts a new run.")
        sys.exit(0)

    # policies: all seeds of the first arm, then all of the second, and so on
    policies = []
    for arm in args.arms:
        policies += [(arm, args.seed + i) for i in range(args.num_seeds)]
    models, optimizers = [], []
    for _, seed in policies:
        torch.manual_seed(seed)  # all arms of a seed start alike
        model = Transformer()
        models.append(model)
        optimizers.append(torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01, fused=True))

    # task
    digits, chance, correct, solution = arithmetic_problems()
    strides = torch.tensor([50, 10, 1])  # answer @ strides is its index in `correct`

    def write(path, text, mode="a"):
        with plain_error(f"{path} cannot be written; make room, --run-name {run_dir.name} then goes on"):
            with open(path, mode) as file:
                file.write(text)

    def run_evaluation(step, metrics):
        sums = defaultdict(float)
        for (arm, seed), model, logged in zip(policies, models, metrics, strict=True):
            figures = evaluate_exactly(model, digits, correct, chance, args.max_z, args.temperature)
            record = {"step": step, "arm": arm, "seed": seed} | figures | logged
            write(metrics_path, json.dumps(record) + "\n")
            sums[arm] += np.array([figures["eval/pass@1"], figures[f"eval/pass@{args.max_z}"]])
        line = f"update {step}/{args.num_steps}, pass@1 and pass@{args.max_z}:"
        for arm in args.arms:
            pass_1, pass_n = sums[arm] / args.num_seeds
            line += f"  {arm} {pass_1:.3f} {pass_n:.3f}"
        tqdm.write(line)
        sys.stdout.flush()

    # resume: what was logged after the checkpoint is cut off and done again
    state = {"step": 0, "metrics_bytes": 0}
    if checkpoint_path.exists():
        with plain_error(f"{checkpoint_path} cannot be read; delete it to start the run again"):
            state = torch.load(checkpoint_path, weights_only=True)
            for i in range(len(policies)):
                models[i].load_state_dict(state["models"][i])
                optimizers[i].load_state_dict(state["optimizers"][i])
        print(f"{run_dir} goes on after update {state['step']}.")
    found = metrics_path.stat().st_size if metrics_path.exists() else 0
    if found < state["metrics_bytes"]:
        sys.exit(f"error: {metrics_path} is shorter than at its checkpoint; restore it, or choose another --run-name.")
    with open(metrics_path, "ab") as file:
        file.truncate(state["metrics_bytes"])

    # imitation: cross-entropy of one solution, summed over its tokens; z is random, so all skills start alike
    if state["step"] == 0:
        tree = answer_tree(1, 1)
        for step in tqdm(range(1, args.imitation_steps + 1), desc="imitation", file=sys.stdout, disable=None):
            for policy, model, optimizer in zip(policies, models, optimizers, strict=True):
                _, seed = policy
                chosen, z, _ = draw(seed, step, 0, chance, args)
                answers = solution[chosen][:, None]  # [B, 1, 3]
                left, operator = answers[..., 0], answers[..., 1]
                tokens = torch.cat([make_prompts(digits[chosen], z), left, 10 + operator], -1)  # [B, 10]
                logps = answer_logps(branch_logps(model(tokens, tree), 1, 1.0), answers)  # [B, 1]
                update(model, optimizer, -logps.mean(), args.max_grad_norm, policy)
        state["references"] = [copy.deepcopy(model.state_dict()) for model in models]
        run_evaluation(0, [{} for _ in policies])
    references = copy.deepcopy(models)  # the imitators, for --kl-coef
    for model, weights in zip(references, state["references"], strict=True):
        model.load_state_dict(weights)

    signals = []  # before, a signal ends the program: there is nothing to save yet
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda signum, frame: signals.append(signum))

    # reinforcement
    tree = answer_tree(args.group_size, 1)
    t0, logged_step = time.perf_counter(), state["step"]
    steps = range(state["step"] + 1, args.num_steps + 1)
    for step in tqdm(steps, initial=state["step"], total=args.num_steps, file=sys.stdout, disable=None):
        metrics = []
        for i, (arm, seed) in enumerate(policies):
            model = models[i]

            # rollout
            chosen, z, noise = draw(seed, step, 1, chance, args)
            prompts = make_prompts(digits[chosen], z)  # [B, 8]
            tokens, answers, logits = sample_answers(model, prompts, noise, args.temperature, tree)

            # reward
            r_correct = correct[chosen[:, None], answers @ strides].float()  # [B, C]
            r_mi = torch.zeros_like(r_correct)
            if arm in ("mi", "gated-mi"):
                logps_z = skill_logps(model, tokens, answers, logits, args.max_z, tree)  # [B, N, C]
                alpha = args.alpha if arm == "mi" else args.gated_alpha
                beta = args.beta if arm == "mi" and args.beta is not None else alpha
                r_mi = misl_rewards(logps_z, alpha, beta, args.cap)

            # advantages
            gated = arm == "gated-mi"
            pass_k = arm == "pass-k" or (gated and args.gated_advantage == "pass-k")
            advantages = arm_advantages(r_correct, r_mi, pass_k, gated)  # [B, C]

            # update: a sum over the B C answers, as in the original; a gradient that is not 0 is mostly clipped
            logps = answer_logps(branch_logps(logits, args.group_size, args.temperature), answers)  # [B, C]
            loss = -(logps * advantages).sum()
            logged = {"charts/accuracy": r_correct.mean().item(), "skill/mi_reward": r_mi.mean().item()}
            if args.kl_coef:
                with torch.no_grad():
                    reference_logits = references[i](tokens, tree)
                branches = branch_logps(logits, args.group_size, 1.0)
                kl = exact_kl(branches, branch_logps(reference_logits, args.group_size, 1.0))  # [B, C]
                loss = loss + args.kl_coef * kl.sum()
                logged["losses/kl"] = kl.mean().item()
            logged["losses/grad_norm"] = update(model, optimizers[i], loss, args.max_grad_norm, policies[i])
            metrics.append(logged)

        # evaluation and checkpoint
        last = step == args.num_steps
        if last or step % args.eval_every == 0:
            seconds = (time.perf_counter() - t0) / (step - logged_step)
            for logged in metrics:
                logged["time/update"] = seconds
            run_evaluation(step, metrics)
            t0, logged_step = time.perf_counter(), step
        if last or signals or step % args.save_every == 0:
            state = {"step": step, "metrics_bytes": metrics_path.stat().st_size, "references": state["references"]}
            state["models"] = [model.state_dict() for model in models]
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            with plain_error(f"the checkpoint cannot be written to {run_dir}; make room"):
                torch.save(state, run_dir / "unfinished.pt")
                (run_dir / "unfinished.pt").rename(checkpoint_path)
        if signals:
            print(f"signal {signals[0]}: stopped after update {step}; --run-name {run_dir.name} goes on from there.")
            sys.exit(128 + signals[0])

    # the end: the table
    records = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    records = [record for record in records if record["step"] == args.num_steps]
    table = results_table(records, args.arms, args.max_z)
    print(f"\n{table}\nmetrics: {metrics_path}   policies: {checkpoint_path}")
    write(run_dir / "table.tmp", table, mode="w")
    (run_dir / "table.tmp").rename(table_path)
