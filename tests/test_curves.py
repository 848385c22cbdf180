"""benchmark/curves.py: means and intervals by hand, groups, arms in one file, and what it says of wrong input."""

import json
import runpy
import sys

import pytest
from conftest import ROOT

CURVES = runpy.run_path(str(ROOT / "benchmark" / "curves.py"))


def write(folder, records):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def runs(tmp_path):
    for seed, last in (1, 1.0), (2, 2.0), (3, 6.0):
        records = [
            {"step": 0, "charts/reward": 0.0},
            {"step": 1, "eval/pass@1": 0.5},
            {"step": 2, "charts/reward": last},
        ]
        write(tmp_path / f"ours_{seed}", records + ([{"step": 3, "charts/reward": 9.0}] if seed == 1 else []))
    write(tmp_path / "a=b", [{"step": 0, "charts/reward": 1.0, "skill/accuracy": [0.1, 0.2]}])
    arms = [{"step": 0, "arm": arm, "seed": seed, "loss": seed} for arm in ("grpo", "mi") for seed in (0, 4)]
    write(tmp_path / "arms", arms)
    return tmp_path


def test_mean_and_interval(runs):
    """Three runs that end at 1, 2 and 6: mean 3, standard error sqrt(7 / 3), t of two degrees of freedom 4.3027."""
    own = CURVES["read_runs"]((f"ours={runs}/ours_?",))
    steps, mean, half = CURVES["curve"](own["ours"], "charts/reward", "step", 1)
    assert steps == [0, 2] and list(mean) == [0.0, 3.0]  # step 3 is not in all runs
    assert half == pytest.approx([0.0, 4.3026527 * (7 / 3) ** 0.5])
    steps, mean, half = CURVES["curve"](own["ours"][:1], "charts/reward", "step", 2)
    assert steps == [0, 2, 3] and list(mean) == [0.0, 0.5, 5.0] and list(half) == [0.0, 0.0, 0.0]


def test_groups(runs):
    """A label joins its patterns; a folder names itself, even with "=" in its name; arms of a file are groups."""
    groups = (f"x={runs}/ours_1", f"x={runs}/ours_2", f"{runs}/a=b", f"z={runs}/a=?", f"{runs}/arms", f"y={runs}/arms")
    own = CURVES["read_runs"](groups)
    assert {label: len(records) for label, records in own.items()} == {
        "x": 2, "a=b": 1, "z": 1, "grpo": 2, "mi": 2, "y grpo": 2, "y mi": 2,
    }  # fmt: skip


def plot(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, words)])
    runpy.run_path(str(ROOT / "benchmark" / "curves.py"), run_name="__main__")


def test_figure(runs, monkeypatch):
    output = runs / "new" / "figure.png"
    keys = ["--keys", "charts/reward", "eval/pass@1", "loss", "charts/reward"]
    plot(monkeypatch, f"ours={runs}/ours_?", runs / "arms", *keys, "--smooth", 3, "--output", output)
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/nothing", "--keys", "loss"], "nothing has no metrics.jsonl"),
        (["{}/ours_1", "--keys", "los"], "los is no number in these runs. They have charts/reward, eval/pass@1, step."),
        (["{}/a=b", "--keys", "skill/accuracy"], "skill/accuracy is no number"),
        (["{}/ours_1", "--keys", "charts/reward", "--x", "global_step"], "global_step is no number"),
        (["all={}/*", "--keys", "charts/reward"], "the runs of all have charts/reward at no step in common"),
        (["{}/broken", "--keys", "loss"], "line 1 is no JSON"),
        (["{}/ours_1", "--keys", "charts/reward", "--smooth", "0"], "--smooth 0 must be at least 1"),
    ],
    ids=["no run", "no key", "list", "no x", "nothing in common", "broken", "no smoothing"],
)
def test_wrong_input(runs, monkeypatch, words, message):
    write(runs / "other", [{"step": 7, "charts/reward": 1.0}])
    if "broken" in words[0]:
        (runs / "broken").mkdir()
        (runs / "broken" / "metrics.jsonl").write_text("{\n")
    with pytest.raises(SystemExit, match="error: ") as stop:
        plot(monkeypatch, *(word.format(runs) for word in words), "--output", runs / "no.png")
    assert message in str(stop.value) and not (runs / "no.png").exists()
