"""Nothing on stderr but the program's own lines."""

import logging
import warnings

import pytest
from helpers import sd


@pytest.mark.parametrize("asked", [False, True])
def test_libraries_speak_only_if_asked(asked, monkeypatch, capsys, one_prompt):
    """A compiler's warnings and logs, and what it says as it fails: not shown, but with TORCH_LOGS and python -W."""
    said, handler = [], logging.Handler()
    handler.emit = said.append

    def compile_steps(*_):
        warnings.warn("TensorFloat32 tensor cores are not enabled", stacklevel=1)
        for library in ("torch._inductor.scheduler", "transformers.models", "accelerate.big_modeling"):
            logger = logging.getLogger(library)
            monkeypatch.setattr(logger, "handlers", [handler])
            logger.critical("Error in codegen")
        raise RuntimeError("no such code")

    monkeypatch.setattr(sd, "compile_steps", compile_steps)
    logging.disable(logging.NOTSET)  # as in a new process
    monkeypatch.setattr(sd.sys, "warnoptions", ["default"] * asked)
    if asked:
        monkeypatch.setenv("TORCH_LOGS", "cudagraphs")
    else:
        monkeypatch.delenv("TORCH_LOGS", raising=False)
    options = ["--compile", "on", "--draft-tokens", "1", "--max-new-tokens", "4", "--prompts", str(one_prompt)]
    assert sd.main(["--demo", "--device", "cpu", *options]) == 0
    output = capsys.readouterr()
    assert "compiling failed, so this runs eagerly: no such code" in output.out
    assert output.err.startswith("Loading ") and (output.err.count("\n") > 1) <= asked
    assert len(said) == 3 * asked
