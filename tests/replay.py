"""python tests/replay.py NAME.pkl script.py ...: run a script as __main__; what it samples is kept in NAME.new.

Where NAME.pkl exists, the rollouts in it take the place of new ones, so that runs in one and in several processes,
whose engines draw differently, train on the same samples. Everything else runs as it is, engines and syncs too.
"""

import os
import pickle
import sys
from pathlib import Path

kept, script = Path(sys.argv[1]), Path(sys.argv[2])
recorded = iter(pickle.loads(kept.read_bytes())) if kept.exists() else None
seen = []


def replayed(rollout, *arguments):
    samples = rollout(*arguments)
    samples = samples if recorded is None else next(recorded)
    seen.append(samples)
    if recorded is None and os.environ.get("RANK", "0") == "0":
        kept.with_suffix(".new").write_bytes(pickle.dumps(seen))
    return samples


source = script.read_text()
name = "sample" if " = sample(llm, " in source else "rollout"
assert f" = {name}(llm, " in source
sys.argv = sys.argv[2:]
sys.path.insert(0, str(script.parent))
code = compile(source.replace(f" = {name}(llm, ", f" = replayed({name}, llm, "), script, "exec")
exec(code, {"__name__": "__main__", "__file__": str(script), "replayed": replayed})
