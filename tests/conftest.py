"""Fixtures: the models that many tests share, and one run of the plain command."""

import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, make_model, sd


@pytest.fixture(autouse=True)
def signals_as_before():
    """What the program does with Ctrl-C ends with the test that ran it."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def costs_are_measured_in_an_instant(monkeypatch):
    monkeypatch.setattr(sd, "COSTS_S", 0)


@pytest.fixture(scope="session")
def gemma2():
    return make_model("gemma2")


@pytest.fixture(scope="session")
def llama():
    return make_model("llama")


@pytest.fixture
def one_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n\nWhat does heapq.merge do?\n")
    return path


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The plain command, as a process of its own, in another folder: on a machine with no accelerator, the demo.

    The finished process and its JSON; with a fixed draft length and the automatic one. Run once for all of pytest's
    workers, whose folders lie side by side.
    """
    base = tmp_path_factory.getbasetemp()
    folder = base.parent / "demo" if "PYTEST_XDIST_WORKER" in os.environ else base / "demo"
    folder.mkdir(exist_ok=True)
    kept, out = folder / "done.pickle", folder / "out.json"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            program, options = ROOT / "speculative_decoding.py", ["--device", "cpu", "--draft-tokens", "3,auto"]
            command = [sys.executable, program, *options, "--json", out]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
            kept.write_bytes(pickle.dumps(done))
    return pickle.loads(kept.read_bytes()), json.loads(out.read_text())
