"""Exit with an error unless a quick-start result shows that the student learned.

python scripts/check_quickstart.py RESULT_JSON
"""

import json
import pathlib
import sys

AVG_GAIN, GREEDY_GAIN, PROMPTS = 0.10, 0.08, 512


result = json.loads(pathlib.Path(sys.argv[1]).read_text())
before, after = result["eval_before"], result["eval_after"]
prompts = min(before["num_prompts"], after["num_prompts"])
checks = {
    f"avg@k rises by {AVG_GAIN}": after["avg@k"] - before["avg@k"] >= AVG_GAIN,
    f"greedy rises by {GREEDY_GAIN}": after["greedy"] - before["greedy"] >= GREEDY_GAIN,
    "pass@k does not fall": after["pass@k"] >= before["pass@k"],
    f"at least {PROMPTS} held-out prompts": prompts >= PROMPTS,
}
if missing := [claim for claim, holds in checks.items() if not holds]:
    sys.exit("the quick start missed: " + "; ".join(missing))
print("the quick start passed: avg@k, greedy and pass@k are as expected")
