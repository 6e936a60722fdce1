"""Fixtures: the models that many tests share, and one run of the plain command."""

import json
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

    The finished process and its JSON; with a fixed draft length and the automatic one.
    """
    folder = tmp_path_factory.mktemp("demo")
    program, options = ROOT / "speculative_decoding.py", ["--device", "cpu", "--draft-tokens", "3,auto"]
    command = [sys.executable, program, *options, "--json", "out.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    return done, json.loads((folder / "out.json").read_text())
