"""Where a step's time goes: median (and 10th to 90th percentile) of every time/* key of one or more runs.

    python benchmark/step_times.py runs/a/metrics.jsonl [runs/b/metrics.jsonl ...]

The first 3 steps of each run are left out: they warm caches up. Machines are noisy: compare ratios within one line.
"""

import json
import sys

import numpy as np

for path in sys.argv[1:]:
    with open(path) as file:
        steps = [record for record in map(json.loads, file) if "time/rollout" in record][3:]
    for record in steps:
        phases = [seconds for key, seconds in record.items() if key.startswith("time/")]
        record.setdefault("time/total", sum(phases))
    total = np.median([record["time/total"] for record in steps])
    completions = steps[0]["global_step"] / steps[0]["step"]
    length = np.mean([record["charts/length"] for record in steps])
    print(f"{path}: {len(steps)} steps of {completions:.0f} completions of {length:.0f} tokens")
    for key in [key for key in steps[0] if key.startswith("time/")]:
        low, median, high = np.quantile([record[key] for record in steps], (0.1, 0.5, 0.9))
        print(f"  {key:<24}{median:8.3f} s  [{low:.3f}, {high:.3f}]  {median / total:6.1%}")
