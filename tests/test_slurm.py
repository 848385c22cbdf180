"""The sbatch wrappers, with stand-ins for srun and scontrol that run the job's tasks here: no Slurm is needed."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

WRAPPERS = sorted((ROOT / "slurm").glob("*.sbatch"))
SRUN = """#!/usr/bin/env python3
import os, subprocess, sys
command = [word for i, word in enumerate(sys.argv[1:]) if not word.startswith(("--kill", "--wait")) or i > 1]
tasks, per_node = int(os.environ["SLURM_NTASKS"]), int(os.environ["TASKS_PER_NODE"])
started = [subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % per_node)})
           for i in range(tasks)]
sys.exit(max(process.wait() for process in started))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; echo other; else echo "scontrol $*"; fi
"""
SCRIPT = """
import os, sys
import torch
rank = int(os.environ.get("RANK", 0))
total = torch.ones(1)
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    torch.distributed.init_process_group("gloo")
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
words = ["rank", rank, "local", os.environ.get("LOCAL_RANK"), "of", int(total), *sys.argv[1:]]
words += [os.environ[name] for name in ("HF_HUB_OFFLINE", "WANDB_MODE", "OMP_NUM_THREADS")]
os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # at once: the ranks share a pipe
sys.exit(int(os.environ.get("CODE", 0)))
"""


@pytest.fixture
def submit(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("activate", "export ACTIVATED=1\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "job.py").write_text(SCRIPT)

    def run(wrapper, *arguments, **variables):
        lines = wrapper.read_text()
        per_node = re.search(r"#SBATCH --ntasks(?:-per-node)?=(\d+)", lines)[1]
        nodes = re.search(r"#SBATCH --nodes=(\d+)", lines)[1]
        slurm = {
            "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "2",
            "SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "a[1-2]",
            "SLURM_NTASKS": str(int(per_node) // 4 * int(nodes) or 1), "TASKS_PER_NODE": str(int(per_node) // 4 or 1),
            "VENV": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        }  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")}
        command = ["bash", str(wrapper), *map(str, arguments)]
        return subprocess.run(command, env=environment | slurm | variables, capture_output=True, text=True, cwd="/")

    return run


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda path: path.stem)
def test_dry_run(wrapper, submit):
    """An eighth of a node's tasks each; all ranks meet, the run's name outlives a requeue, codes are passed on."""
    assert subprocess.run(["bash", "-n", wrapper]).returncode == 0
    for option in ("array=1-3", "requeue", "signal=USR1@600", "open-mode=append"):
        assert f"#SBATCH --{option}" in wrapper.read_text()
    tasks = {"single_gpu": 1, "single_node": 2, "multi_node": 4}[wrapper.stem]
    done = submit(wrapper, "job.py", "--lr", "1e-6")
    assert done.returncode == 0, done.stderr
    arguments = "--lr 1e-6 --run-name job_77_seed2 --seed 2"
    locals_ = [None] if tasks == 1 else [str(i % 2) for i in range(tasks)]
    expected = {f"rank {i} local {local} of {tasks} {arguments} 1 offline 1" for i, local in enumerate(locals_)}
    assert set(done.stdout.splitlines()) == expected
    stopped = submit(wrapper, "job.py", CODE="138", RUN="mine")
    assert stopped.returncode == 138 and "scontrol requeue 77_2" in stopped.stdout
    assert "--run-name mine_seed2" in stopped.stdout
    failed = submit(wrapper, "job.py", CODE="2", HF_HUB_OFFLINE="0", OMP_NUM_THREADS="3")
    assert failed.returncode == 2 and "requeue" not in failed.stdout and "0 offline 3" in failed.stdout
    nothing = submit(wrapper, "nothing.py")
    assert nothing.returncode == 2 and f"usage: sbatch slurm/{wrapper.name}" in nothing.stderr
