"""Updates per second of arithmetic_misl.py, both arms of figure 4 at once, and how the cost grows with seeds, N and C.

    python benchmark/arithmetic_speed.py

Every row is a run of its own: 20 updates to warm up, then the mean of 20; evaluations are not counted. Machines are
noisy: compare the last column, seconds an update over those of the default with one seed, measured again at the end.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

SCRIPT = pathlib.Path(__file__).parents[1] / "arithmetic_misl.py"


def seconds_an_update(*arguments) -> float:
    """Mean of updates 21 to 40 of the pair grpo and mi."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, SCRIPT, "--output-dir", folder, "--run-name", "run", "--arms", "grpo", "mi",
                   "--num-steps", "41", "--eval-every", "20", "--imitation-steps", "0", *arguments]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        records = map(json.loads, (pathlib.Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        return next(record["time/update"] for record in records if record["step"] == 40)


if __name__ == "__main__":
    rows = [["--num-seeds", "1"], ["--num-seeds", "2"], ["--num-seeds", "5"], ["--num-seeds", "10"]]
    rows += [["--num-seeds", "1", "--max-z", n] for n in ("2", "3", "10")]
    rows += [["--num-seeds", "1", "--group-size", c] for c in ("2", "10")] + [["--num-seeds", "1"]]
    base = None
    print(f"{'two arms, ' + ' '.join(rows[0]) + ', N = 5, C = 5 and':<44}{'updates/s':>10}{'ms':>8}{'ratio':>8}")
    for row in rows:
        seconds = seconds_an_update(*row)
        base = base or seconds
        print(f"{' '.join(row):<44}{1 / seconds:>10.1f}{1000 * seconds:>8.1f}{seconds / base:>8.2f}", flush=True)
