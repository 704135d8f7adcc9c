"""A gcloud whose cloud is a directory: queued resources that take a while, slices that are taken
away, workers that run what they are told.

    FAKE_CLOUD=DIR python fake_gcloud.py compute tpus …

`DIR/plan.json`: how many looks a resource waits before it is ACTIVE, at which look each slice is
taken away, which share of the calls fails, half of them after they have done their work. A worker
is `DIR/disk`, the home of what runs there; it goes with the slice.
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["FAKE_CLOUD"])
STATE, DISK = CLOUD / "state.json", CLOUD / "disk"


def main(words):
    plan = json.loads((CLOUD / "plan.json").read_text())
    state = {"calls": 0, "slices": 0, "name": None, "looks": 0}
    if STATE.exists():
        state |= json.loads(STATE.read_text())
    state["calls"] += 1
    fate = random.Random(f"{plan['seed']} {state['calls']}").random()
    with (CLOUD / "calls").open("a") as log:
        log.write(f"{' '.join(words[2:5])}{' fails' if fate < plan['failures'] else ''}\n")
    status, text = 1, "ERROR: (gcloud) UNAVAILABLE: try again later"
    if fate >= plan["failures"]:
        status, text = run(words, plan, state)
    elif fate < plan["failures"] / 2:  # done, and nobody hears of it
        run(words, plan, state)
    STATE.write_text(json.dumps(state))
    print("WARNING:  Python 3.9 is no longer supported by the Google Cloud CLI.", file=sys.stderr)
    if text:
        print(text, file=sys.stderr if status else sys.stdout)
    return status


def run(words, plan, state):
    """(exit status, what is printed) of one call."""
    assert words[:2] == ["compute", "tpus"], words
    verb = " ".join(words[2:4])
    return {
        "queued-resources create": create,
        "queued-resources describe": look,
        "queued-resources delete": delete,
        "queued-resources list": lambda *_: (0, state["name"] or "none"),
        "tpu-vm describe": node,
        "tpu-vm scp": copy,
        "tpu-vm ssh": ssh,
    }[verb](words[4:], plan, state)


def create(words, plan, state):
    if state["name"]:
        return 1, f"ERROR: (gcloud) ALREADY_EXISTS: {words[0]}"
    state |= {"name": words[0], "looks": 0, "slices": state["slices"] + 1}
    return 0, ""


def look(words, plan, state):
    if state["name"] != words[0]:
        return 1, f"ERROR: (gcloud) NOT_FOUND: {words[0]}"
    state["looks"] += 1
    if state["looks"] <= plan["waits"]:
        return 0, "PROVISIONING" if state["looks"] % 2 else "WAITING_FOR_RESOURCES"
    DISK.mkdir(exist_ok=True)
    lost = plan["taken_away_at"]
    if state["slices"] <= len(lost) and state["looks"] >= lost[state["slices"] - 1]:
        wipe()
        return 0, "SUSPENDED"
    return 0, "ACTIVE"


def node(words, plan, state):
    if state["slices"] == 1 and state["looks"] >= plan.get("node_gone_at", 10**9):
        wipe()
    return (0, "READY") if DISK.exists() else (1, "ERROR: (gcloud) NOT_FOUND: node")


def delete(words, plan, state):
    assert "--quiet" in words, "would ask"
    wipe()
    state["name"] = None
    return 0, ""


def wipe():
    for file in DISK.glob("tmux-*"):
        end(file)
    shutil.rmtree(DISK, ignore_errors=True)


def end(file):
    with contextlib.suppress(ProcessLookupError, ValueError):
        os.killpg(int(file.read_text()), signal.SIGKILL)
    file.unlink(missing_ok=True)


def copy(words, plan, state):
    files = [word for word in words if not word.startswith("--") and not word.endswith(":")]
    if not DISK.exists():
        return 1, "ERROR: (gcloud) ssh: no route to host"
    for file in files:
        shutil.copy(file, DISK)
    return 0, ""


def ssh(words, plan, state):
    if not DISK.exists():
        return 1, "ERROR: (gcloud) ssh: no route to host"
    command = next(word.partition("=")[2] for word in words if word.startswith("--command="))
    bin_ = pathlib.Path(__file__).parent / "fake_worker"
    environment = os.environ | {
        "HOME": str(DISK),
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "TMUX_DIR": str(DISK),
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=DISK, env=environment, capture_output=True, text=True
    )
    return done.returncode, (done.stdout + done.stderr).strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
