"""Compiled decoding on the CPU: the same tokens, no steps but those asked for, and whole graphs in fixed memory."""

import itertools

import pytest
import torch
import transformers
from helpers import baseline, counts_of, like, make_model, mixed, prompt_of, speculate, with_more_tokens
from torch._dynamo.utils import counters
from torch._inductor import config, cudagraph_utils
from torch._inductor.async_compile import AsyncCompile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import speculative_decoding as sd

PROMPTS = [[5, 9, 13, 2, 40], [3], [7, 8], list(range(1, 31)), [11] * 12]  # of 1 to 30 tokens: a window is 8 long
NEW = 20
CAPACITY = max(map(len, PROMPTS)) + NEW + 17
CHEAP = [1.0, 1.15, 1.3, 1.45, 1.6]  # seconds of a round of 0 to 4 draft tokens
DEAR = [1.0, 2.3, 3.5, 4.7, 5.9]  # a draft that never pays


def compiled(model, sampler, *steps, bounds=(CAPACITY,)):
    cached = sd.CompiledModel(model, None, None, *bounds)
    for (then, tokens, logits_to_keep), bound in itertools.product(steps, cached.bounds):
        cached.compile(then, tokens, sampler.uniform(1) if logits_to_keep else None, logits_to_keep, bound)
    return cached


def compiled_pair(sampler, bounds=(CAPACITY,), draft_bounds=(CAPACITY,), noise=0.05):
    model = make_model("gemma2")
    draft_model = like(model, noise)
    main = compiled(model, sampler, (sampler.sample, 1, 1), (sampler.score, 5, 0), bounds=bounds)
    steps = (sampler.sample_draft, 1, 1), (sampler.sample_draft, 2, 1)
    draft = compiled(draft_model, sampler, *steps, bounds=draft_bounds)
    return model, draft_model, main.limited_to((5,)), draft


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were traced, which are then run by Python: quicker to make than those that are compiled."""
    traced, compile_for_real = [], torch.compile

    def keep(graph, inputs):
        traced.append(graph)
        return graph

    def trace(function, options, **how):  # all that the program asks for, but for CUDA graphs
        unguarded = {"guard_filter_fn": options["guard_filter_fn"]}
        return compile_for_real(function, backend=keep, options=unguarded, **how)

    monkeypatch.setattr(torch, "compile", trace)
    return traced


def test_compiled_is_exact_and_never_compiles_again(monkeypatch):
    """By the real compiler: sliding windows, prompts of 1 to 30 tokens, every kind of step, two bounds of the cache.

    The program drops the compiler's guards; here they are kept, so that one that would ask for compiling anew is seen.
    """
    monkeypatch.setattr(torch.compiler, "skip_all_guards_unsafe", lambda guards: [True] * len(guards))
    sampler = sd.Greedy()
    model, draft_model, main, draft = compiled_pair(sampler, (24, CAPACITY))

    def memory():
        return [part.data_ptr() for layer in main.cache.layers for part in (layer.keys, layer.cumulative_length)]

    storage = memory()
    auto, resting = sd.AutoSchedule(CHEAP, True), sd.AutoSchedule(DEAR, True)
    resting.rest = 6
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompt in PROMPTS:
            expected = baseline(model, prompt, NEW).token_ids
            assert baseline(main, prompt, NEW).token_ids == expected
            runs = [speculate(main, draft, prompt, length, NEW) for length in (4, 2, auto, resting)]
            assert [run.token_ids for run in runs] == [expected] * 4
            reference, padded = speculate(model, draft_model, prompt, 2, NEW), runs[1]
            assert counts_of(padded) == counts_of(reference)
            assert padded.log_likelihood == pytest.approx(reference.log_likelihood, rel=1e-4)
    assert storage == memory()  # no new storage between prompts


def test_drawing_can_be_compiled_too(graphs):
    """The same draws as eagerly, with the graphs as they are traced. Without guards."""
    sampler = sd.Sampling(0.9, top_k=20, top_p=0.9, seed=3)
    model, draft_model, main, draft = compiled_pair(sampler)
    assert len(graphs) == 4
    assert not any(weight.requires_grad for weight in model.parameters())  # or graphs would keep what training needs
    for number, prompt in enumerate(PROMPTS):
        for k in (4, 2):
            expected = speculate(model, draft_model, prompt, k, NEW, sampler=sampler, number=number)
            result = speculate(main, draft, prompt, k, NEW, sampler=sampler, number=number)
            assert (result.token_ids, counts_of(result)) == (expected.token_ids, counts_of(expected))
        own = baseline(main, prompt, NEW, sampler=sampler, number=number).token_ids
        assert own == baseline(model, prompt, NEW, sampler=sampler, number=number).token_ids
    assert len(graphs) == 4  # one for each kind of step and number of tokens, and none since


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_draft_that_knows_fewer_tokens_can_be_compiled_too(graphs, temperature):
    sampler = sd.Sampling(temperature, seed=3) if temperature else sd.Greedy()
    known = make_model("gemma2")
    model, draft_model = with_more_tokens(known), like(known, 0.02)
    main = compiled(model, sampler, (sampler.sample, 1, 1), (sampler.score, 4, 0))
    draft = compiled(draft_model, sampler, (sampler.sample_draft, 1, 1), (sampler.sample_draft, 2, 1))
    for number, prompt in enumerate([[5, 9, 70, 2], [79]]):
        expected = speculate(model, draft_model, prompt, 3, NEW, sampler=sampler, number=number)
        result = speculate(main, draft, prompt, 3, NEW, sampler=sampler, number=number)
        assert (result.token_ids, counts_of(result)) == (expected.token_ids, counts_of(expected))
        assert max(result.token_ids) >= 61
        if not temperature:
            assert result.token_ids == baseline(model, prompt, NEW).token_ids
    assert len(graphs) == 4


def test_steps_attend_to_no_more_than_the_bound_that_holds_the_text(graphs):
    """With graphs of which each attends to its own bound: across bounds, and back when the draft is rolled back."""
    bounds, sampler, returned = (16, 40, CAPACITY + -CAPACITY % 8), sd.Greedy(), 0
    model, draft_model, main, draft = compiled_pair(sampler, bounds, bounds, noise=0.2)
    assert len(graphs) == 4 * len(bounds)
    of_main, of_draft = note_steps(main, parts=3), note_steps(draft, parts=3)
    for prompt in PROMPTS:
        for k in (4, 2):
            of_main.clear(), of_draft.clear()
            result, reference = speculate(main, draft, prompt, k, NEW), speculate(model, draft_model, prompt, k, NEW)
            assert (result.token_ids, counts_of(result)) == (reference.token_ids, counts_of(reference))
            text, of_text, passes, steps = len(prompt) + 1, [], [], []
            for one in result.rounds:
                passes.append(text + 4)  # what the cache holds in the end
                steps += range(text, text + k)
                text += one.accepted + 1
            for ran, held in ((of_main, passes), (of_draft, steps)):
                of_text = [next(bound for bound in bounds if bound >= tokens) for tokens in held]
                assert [bound for *_, bound in ran] == of_text
            returned += sum(after < before for before, after in itertools.pairwise(of_text))
        assert baseline(main, prompt, NEW).token_ids == baseline(model, prompt, NEW).token_ids
    assert returned  # roll-backs across a bound
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.target is torch.nn.functional.softmax]
    assert {node.meta["example_value"].shape[-1] for node in nodes} == set(bounds)


def test_compiled_steps_round_differently_and_that_is_a_tie():
    """In bfloat16 what is compiled rounds less often: where that flips a token, both outputs are the main model's."""
    model = make_model("llama", dtype=torch.bfloat16)
    sampler = sd.Greedy()
    main = compiled(model, sampler, (sampler.sample, 1, 1))
    kinds = []
    for first in range(1, 40):
        ours, own = (baseline(one, [first, 7], NEW).token_ids for one in (main, model))
        if divergence := sd.find_divergence(main, [first, 7], own, ours):
            kinds.append(divergence.kind)
    assert len(kinds) >= 5 and set(kinds) == {"tie"}


# Which steps are compiled, and which of them run.

LADDER = {3, 5, 9, 16}


@pytest.mark.parametrize(
    ("lengths", "bounds"),
    [
        ([120, 512], [512]),  # a quarter is too little to be worth anything
        ([1023, 120], [1023]),
        ([120, 1024], [256, 1024]),
        ([257, 1024], [1024]),  # nothing would ever fit into a quarter
        ([257, 1024, 4096], [1024, 4096]),
        ([256, 1025, 4096], [256, 4096]),
        ([200, 700, 4100, 30], [256, 1025, 4100]),
    ],
)
def test_bounds_are_those_that_some_text_needs(lengths, bounds):
    assert sd.cache_bounds(lengths) == bounds


@pytest.mark.parametrize(
    ("lengths", "widths"),
    [
        ((1,), {2}),
        ((1, 5), {2, 6}),
        ((2, "auto", 7), LADDER | {8}),  # 3 is on the ladder
    ],
)
def test_only_the_steps_that_the_draft_lengths_run_are_compiled(graphs, lengths, widths):
    model, sampler, announced = make_model("llama"), sd.Greedy(), []
    main, draft = (sd.CompiledModel(one, None, None, CAPACITY) for one in (model, like(model, 0.05)))
    sd.compile_steps(main, {"draft": sd.ModelDraft(draft, sampler)}, sampler, lengths, announced.append)
    assert {key[:2] for key in main.steps} == {("sample", 1), *(("score", width) for width in widths)}
    # A round's first pass of the draft reads two tokens, and the further ones one; with K = 1 there are none.
    assert {key[:2] for key in draft.steps} == {("sample_draft", 2)} | (
        {("sample_draft", 1)} if lengths != (1,) else set()
    )
    assert len(graphs) == len(announced) == len(main.steps) + len(draft.steps)


def test_a_model_that_catches_up_behind_ngrams_needs_a_step_of_one_token(graphs):
    sampler, model = sd.Greedy(), make_model("llama")
    main, draft = (sd.CompiledModel(one, None, None, CAPACITY) for one in (model, like(model, 0.05)))
    sd.compile_steps(main, {"mix": mixed(draft)}, sampler, (1,), lambda line: None)
    assert {key[:2] for key in draft.steps} == {("sample_draft", 1), ("sample_draft", 2)}


def test_without_a_draft_model_only_the_main_models_steps_are_compiled(graphs):
    sampler, announced = sd.Sampling(0.8), []
    main = sd.CompiledModel(make_model("llama"), None, None, CAPACITY)
    sd.compile_steps(main, {"ngram": sd.NgramDraft(main.device)}, sampler, (4,), announced.append)
    assert {key[:2] for key in main.steps} == {("sample", 1), ("score", 5)}
    assert len(graphs) == len(announced) == 2


def note_steps(model, parts=2):
    """A list that grows with each compiled step that runs: by what follows the pass, its tokens, and the bound."""
    ran = []

    def noting(key, step):
        def run(*inputs):
            assert inputs[0].shape == (1, key[1])
            ran.append(key[:parts])
            return step(*inputs)

        return run

    for key, step in list(model.steps.items()):
        model.steps[key] = noting(key, step)
    return ran


class Scripted(sd.FixedSchedule):
    """Drafts 0, 1, 2, … tokens in the rounds, up to a limit, and from 0 on again."""

    rounds = 0

    def wants_another(self, confidences):
        return len(confidences) < self.rounds % (self.draft_tokens + 1)

    def learn(self, drafted, accepted):
        self.rounds += 1


def test_a_pass_is_padded_to_the_next_width_of_its_own_method(graphs):
    """With auto, to the next step of the ladder; with a fixed K, to K + 1, whatever else is compiled in that run."""
    model, sampler = make_model("llama"), sd.Greedy()
    draft_model = like(model, 0.03)
    main, draft = (sd.CompiledModel(one, None, None, CAPACITY) for one in (model, draft_model))
    helper, lookup = sd.ModelDraft(draft, sampler), sd.NgramDraft(main.device)
    sd.compile_steps(main, {"draft": helper}, sampler, (3, 5, "auto"), lambda line: None)
    compiled_graphs = len(graphs)
    of_main, of_draft = note_steps(main), note_steps(draft)
    settings = sd.Settings(main="m", draft=("draft",), draft_tokens=(3, 5, "auto"))
    ours = sd.our_methods(main, {"draft": helper}, sampler, settings, prompt_of([3]))
    methods = {method.label: method for method in ours}
    for number, ids in enumerate(PROMPTS):
        prompt, expected = prompt_of(ids, number, NEW), baseline(model, ids, NEW).token_ids
        for label, width in (("baseline", None), ("K = 3", 4), ("K = 5", 6)):
            of_main.clear(), of_draft.clear()
            result = methods[label].decode(prompt)
            assert result.token_ids == expected
            assert of_main == [("score", width) if width else ("sample", 1)] * (len(result.rounds) or NEW - 1)
            rounds = [("sample_draft", 2), *[("sample_draft", 1)] * (width - 2)] * len(result.rounds) if width else []
            assert of_draft == rounds
        # Without a model, a round with K = 3 drafts 0 to 3 tokens, in a pass of 4, or none and takes a step.
        of_main.clear()
        by_ngrams = sd.Settings(main="m", draft=("ngram",), draft_tokens=(3,))
        result = sd.our_methods(main, {"ngram": lookup}, sampler, by_ngrams, prompt)[1].decode(prompt)
        assert result.token_ids == expected
        assert of_main == [("score", 4) if drafted else ("sample", 1) for drafted, _ in counts_of(result)]
        # With auto, any number.
        of_main.clear()
        result = speculate(main.limited_to(sd.verify_widths("auto", main.device)), draft, ids, Scripted(15), NEW)
        eager = speculate(model, draft_model, ids, Scripted(15), NEW)
        assert result.token_ids == expected and counts_of(result) == counts_of(eager)
        assert result.log_likelihood == pytest.approx(eager.log_likelihood, rel=1e-4)
        padded = [min(width for width in LADDER if width > drafted) for drafted, _ in counts_of(result)]
        drafting = [drafted > 0 for drafted, _ in counts_of(result)]
        passes = zip(drafting, padded, strict=True)
        assert of_main == [("score", width) if drafts else ("sample", 1) for drafts, width in passes]
        # As the program runs it.
        of_main.clear()
        result = methods["K = auto"].decode(prompt)
        assert result.token_ids == expected
        assert {width for then, width in of_main if then == "score"} <= LADDER
        assert len(of_main) == len(result.rounds)
    assert len(graphs) == compiled_graphs


def test_a_draft_that_was_not_asked_reads_on_by_steps_that_are_compiled(graphs):
    """Two tokens at a time, up to twelve; more in one pass. With n-grams that propose in between, too."""
    model, sampler = make_model("gemma2"), sd.Greedy()
    draft_model = like(model, 0.03)
    main, draft = (sd.CompiledModel(one, None, None, CAPACITY) for one in (model, draft_model))
    sd.compile_steps(main, {"draft": sd.ModelDraft(draft, sampler)}, sampler, (4,), lambda line: None)
    of_draft, before = note_steps(draft), len(graphs)
    for rest, passes in ((1, [2, 1]), (2, [2, 2]), (6, [2, 2, 2, 2]), (12, [])):
        of_draft.clear()
        schedule = sd.FixedSchedule(4)
        asked = iter([True] * 6 + [False] * rest + [True] * 400)
        schedule.wants_another = lambda confidences, asked=asked: next(asked) and len(confidences) < 4
        result = speculate(main.limited_to((5,)), draft, PROMPTS[0], schedule, NEW)
        assert result.token_ids == baseline(model, PROMPTS[0], NEW).token_ids
        assert counts_of(result)[1 : 1 + rest] == [(0, 0)] * rest and counts_of(result)[1 + rest][0] == 4
        assert [tokens for _, tokens in of_draft[4 : 4 + len(passes)]] == passes
    mixed = sd.MixedDraft(sd.NgramDraft(main.device, shortest=2), sd.ModelDraft(draft, sampler))
    for prompt in (PROMPTS[0] * 3, PROMPTS[3]):
        result = speculate(main.limited_to((5,)), mixed, prompt, 4, NEW)
        assert result.token_ids == baseline(model, prompt, NEW).token_ids
    assert len(graphs) == before


def test_a_draft_with_a_state_runs_eagerly_beside_compiled_models(graphs):
    config = transformers.Mamba2Config(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=8,
    )
    torch.manual_seed(0)
    model, other = make_model("llama"), transformers.AutoModelForCausalLM.from_config(config).eval()
    settings = sd.Settings(main="m", draft=("state", "ngram"), draft_tokens=(3,), device="cpu")
    models = sd.Models({}, {"state": 61}, {}, None)
    main, drafts, sampler = sd.build(settings, {"m": model, "state": other}, models, [CAPACITY])
    assert type(main) is sd.CompiledModel and type(drafts["state"].model) is sd.RecurrentModel
    sd.compile_steps(main, drafts, sampler, (3,), lambda line: None)
    assert {key[:2] for key in main.steps} == {("sample", 1), ("score", 4)}
    result = speculate(main.limited_to((4,)), drafts["state"], PROMPTS[0], 3, NEW)
    assert result.token_ids == baseline(model, PROMPTS[0], NEW).token_ids


# Linear layers of compiled steps on a CPU.


@pytest.mark.parametrize("streams", [False, True], ids=["packed", "streamed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forms_of_a_linear_layer_compute_the_same(monkeypatch, streams, bias, dtype):
    layer = torch.nn.Linear(40, 24, bias=bias, dtype=dtype).requires_grad_(False)
    layer.__class__, layer.streams = sd.StepLinear, streams
    layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 16)
    library, called = torch.nn.functional.linear, []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *inputs: called.append(1) or library(*inputs))
    for tokens in (1, 3, 5):
        x = torch.randn(1, tokens, 40, dtype=dtype)
        expected = library(x, layer.weight, layer.bias)
        with monkeypatch.context() as compiling:
            compiling.setattr(torch.compiler, "is_compiling", lambda: True)
            output = layer(x)
        tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(output, expected, **tolerance)
    assert len(called) == (2 if dtype == torch.float32 and not streams else 0)  # the library's: one token, and three
    layer(x)
    assert called[-1:] == [1]  # as anything that is not compiled


@pytest.mark.parametrize("streams", [False, True], ids=["packed", "streamed"])
def test_compiled_steps_in_other_forms_choose_the_same_tokens(monkeypatch, graphs, streams):
    monkeypatch.setattr(sd, "SMALL_WEIGHT", 0)
    monkeypatch.setattr(sd, "device_name", lambda device: "AMD EPYC" if streams else "Xeon")
    model, draft_model, main, draft = compiled_pair(sd.Greedy())
    assert main.linears and draft.linears and all(layer.streams == streams for layer in main.linears)
    packed = [sum("packed_linear" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    # Of the four steps, the pass over five tokens; on AMD, the draft's over two, too, whose head sees the last alone.
    assert packed == [0, len(main.linears), 0, len(draft.linears) - 1 if streams else 0]
    for prompt in PROMPTS:
        expected = baseline(model, prompt, NEW).token_ids
        assert baseline(main, prompt, NEW).token_ids == expected
        assert speculate(main, draft, prompt, 4, NEW).token_ids == expected


def test_only_plain_linear_layers_of_large_models_change(monkeypatch):
    class Quantised(torch.nn.Linear):
        pass

    model = make_model("llama")
    head = model.get_output_embeddings()
    assert sd.CompiledModel(model, None, None, 64).linears == []  # all of it fits into a processor's caches
    assert type(head) is torch.nn.Linear
    monkeypatch.setattr(sd, "SMALL_WEIGHT", 0)
    head.__class__ = Quantised
    compiled = sd.CompiledModel(model, None, None, 64)
    assert type(head) is Quantised and head not in compiled.linears and compiled.linears
    assert {type(layer) for layer in compiled.linears} == {sd.StepLinear}


# What a CUDA graph needs.


def test_a_model_that_breaks_the_graph_is_not_compiled(graphs):
    """A step of two graphs, without guards, would be wrong. OPT's positions make it one."""
    sampler = sd.Greedy()
    main = sd.CompiledModel(make_model("opt"), None, None, CAPACITY)
    with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
        main.compile(sampler.sample, 1, None, 1, main.bounds[0])
    assert graphs == []


class Recorded(cudagraph_utils.CUDAGraphPolicy):
    """Notes each graph that inductor would make a CUDA graph of, and runs it as it is."""

    def __init__(self):
        self.graphs = []

    def __deepcopy__(self, memo):  # torch.compile copies the whole configuration
        return self

    def should_wrap(self, graph):
        graph.device_idxs.add(0)  # the CPU has none
        return True

    def cudagraphify(self, model, example_inputs, static_input_idxs, **how):
        static, mutated = set(static_input_idxs), set(how["mutated_input_idxs"])
        copied = [part for place, part in enumerate(example_inputs) if place not in static]
        self.graphs.append((static, mutated, sorted((str(part.dtype), tuple(part.shape)) for part in copied)))
        return model


def check_graphs(model, sampler, steps, monkeypatch, bounds=(CAPACITY,)):
    """Compile steps as on a GPU: each must be one graph whose memory is fixed, but for token ids and a random number.

    On the CPU, with all that inductor decides before it would record a CUDA graph; that last step is left out. So is
    the compiling of the kernels, which takes minutes, and on which nothing of this depends: they do nothing here.
    """
    counters.clear()
    torch._dynamo.reset()
    monkeypatch.setattr(cudagraph_utils, "check_multiple_devices_or_any_cpu_nodes", lambda nodes: None)
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *source: lambda *memory: None)
    policy = Recorded()
    with config.patch(cudagraph_policy=policy, force_disable_caches=True):  # in these, other tests keep their graphs
        compiled(model, sampler, *steps, bounds=bounds)
    assert counters["inductor"]["cudagraph_skips"] == 0 and not counters["graph_break"]
    each = list(itertools.product(steps, bounds))
    assert len(policy.graphs) == len(each)  # one graph for each step and bound
    for (static, mutated, copied), ((_, tokens, logits_to_keep), _) in zip(policy.graphs, each, strict=True):
        assert len(mutated) >= 6  # keys, values and the length of each of two layers
        assert mutated <= static  # or: "skipping cudagraphs due to mutated inputs"
        random = [("torch.float32", (1,))] if logits_to_keep and isinstance(sampler, sd.Sampling) else []
        assert copied == [*random, ("torch.int64", (1, tokens))]  # and no weights, and no cache


def steps_of(sampler):
    return (sampler.sample, 1, 1), (sampler.score, 5, 0), (sampler.sample_draft, 2, 1)


@pytest.mark.parametrize(("family", "sampler"), [("gemma2", sd.Greedy()), ("llama", sd.Sampling(0.8, 5, 0.9))])
def test_each_step_is_one_cuda_graph_that_copies_nothing_but_tokens(family, sampler, monkeypatch):
    check_graphs(make_model(family), sampler, steps_of(sampler), monkeypatch)


def test_a_step_is_one_cuda_graph_for_each_bound_of_the_same_cache(monkeypatch):
    sampler = sd.Greedy()
    check_graphs(make_model("llama"), sampler, [(sampler.score, 5, 0)], monkeypatch, bounds=(16, 40, CAPACITY))


def test_a_cache_whose_memory_could_move_would_be_seen(monkeypatch):
    monkeypatch.setattr(torch._dynamo, "mark_static_address", lambda tensor, guard=False: None)
    sampler = sd.Greedy()
    with pytest.raises(AssertionError, match="<="):
        check_graphs(make_model("llama"), sampler, [(sampler.sample, 1, 1)], monkeypatch)


@pytest.mark.parametrize(("device", "skips", "warned"), [("cuda", 2, True), ("cuda", 0, False), ("cpu", 2, False)])
def test_steps_without_cuda_graphs_are_told(monkeypatch, device, skips, warned):
    """The compiler counts what it skips; on a CPU, too, where there are no such graphs to be had."""
    sampler, announced = sd.Greedy(), []
    main = sd.CompiledModel(make_model("llama"), None, None, CAPACITY)
    monkeypatch.setattr(main, "compile", lambda *step: None)
    monkeypatch.setattr(main, "device", torch.device(device))
    monkeypatch.setitem(counters["inductor"], "cudagraph_skips", skips)
    sd.compile_steps(main, {"ngram": sd.NgramDraft(main.device)}, sampler, (4,), announced.append)
    warning = "warning: no CUDA graphs of 2 steps, which are slow: see TORCH_LOGS=cudagraphs"
    assert announced[2:] == [warning] * warned


class OneDevice(TorchDispatchMode):
    """Rejects operations that involve another device than that of meta tensors, from which nothing can be read."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tensors = [part for part in tree_leaves((args, kwargs, output)) if isinstance(part, torch.Tensor)]
        assert all(part.device.type == "meta" for part in tensors), function
        return output


class OnMeta(sd.Sampling):
    """Draws with random numbers that have no storage."""

    def uniform(self, count):
        return torch.empty(count, device="meta")


@pytest.mark.parametrize("sampler", [sd.Greedy(), OnMeta(0.8, 5, 0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_drafting_and_verifying_read_nothing_from_the_device(graphs, family, is_compiled, sampler):
    model = make_model(family).to("meta")
    main, draft = sd.CachedModel(model), sd.CachedModel(model)
    if is_compiled:
        main = compiled(model, sampler, (sampler.sample, 1, 1), (sampler.score, 5, 0))
        draft = compiled(model, sampler, (sampler.sample_draft, 1, 1), (sampler.sample_draft, 2, 1))
    helper, prompt = sd.ModelDraft(draft, sampler), torch.zeros(1, 7, dtype=torch.long, device="meta")
    last = sampler.sample(main.prefill(prompt), prompt, sampler.uniform(1))
    helper.reset(prompt)
    with OneDevice(), torch.no_grad():
        for text in ([1] * 8, [1] * 10):
            draft_ids, _ = helper.propose(text, sd.FixedSchedule(4))
            main.verify(sampler.score, torch.cat([last, draft_ids], dim=1))
            main.roll_back(3), helper.roll_back(3)
        main.step(sampler.sample, last, sampler.uniform(1))
        helper.propose([1] * 12, sd.AutoSchedule(CHEAP, reads=False))
        helper.roll_back(0)
        with pytest.raises(RuntimeError, match="meta"):  # token by token, the host reads
            helper.propose([1] * 20, sd.AutoSchedule(CHEAP, reads=True))
