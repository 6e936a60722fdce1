"""The code that the compiler writes for a CUDA device, for all that follows a pass; no device is needed for it."""

import sys
import types

import pytest
import torch
from helpers import sd
from torch._inductor import graph, scheduler, utils
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _triton

H100 = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
SAMPLERS = [sd.Greedy(), sd.Sampling(0.8), sd.Sampling(0.8, top_k=40), sd.Sampling(0.8, top_p=0.9)]


@pytest.fixture
def generate(monkeypatch):
    """Returns the code for a function of logits, [rows, 256000], ids, [1, rows], and a random number, on an H100."""
    monkeypatch.setattr(DeviceProperties, "create", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(scheduler, "has_triton", lambda: True)
    monkeypatch.setattr(_triton, "triton_hash_with_backend", lambda: "")
    if not _triton.has_triton_package():  # all that is asked of it
        b32, b64 = (types.SimpleNamespace(primitive_bitwidth=bits) for bits in (32, 64))
        monkeypatch.setattr(utils, "get_triton_attrs_descriptor_version", lambda: utils.TritonAttrsDescriptorVersion(4))
        monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
        monkeypatch.setitem(sys.modules, "triton.language", types.SimpleNamespace(float32=b32, float64=b64, uint64=b64))

    def generate(then, rows):
        inputs = torch.zeros(rows, 256_000, dtype=torch.bfloat16), torch.zeros(1, rows).long(), torch.zeros(1)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, V.set_fake_mode(mode):
            traced = make_fx(torch.func.functionalize(lambda *of: then(*of)), select_decomp_table())(*inputs)
            for node in [node for node in traced.graph.nodes if "device" in node.kwargs]:  # traced for a CPU
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            inputs = [torch.empty_like(value, device="cuda") for value in inputs]
            FakeTensorProp(traced, mode).propagate_dont_convert_inputs(*inputs)
            with V.set_graph_handler(graph.GraphLowering(traced, inputs)), V.set_debug_handler(DebugContext()):
                V.graph.run(*inputs)
                return V.graph.codegen()[0].value

    return generate


@pytest.mark.parametrize("name, rows", [("sample", 1), ("sample_draft", 1), ("score", 5), ("score", 16)])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=["greedy", "sampled", "top-k", "top-p"])
def test_the_compiler_writes_kernels_for_every_step(generate, sampler, name, rows):
    code = generate(getattr(sampler, name), rows)
    assert "async_compile.triton(" in code and "async_compile.cpp" not in code


def test_what_only_a_cpu_has_is_refused(generate):
    with pytest.raises(torch._inductor.exc.LoweringException):
        generate(lambda x, *_: torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], ""), 5)
