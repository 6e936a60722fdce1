"""Compiled decoding on a CPU: the same tokens, whole graphs in fixed memory, and runs where nothing compiles."""

import contextlib
import itertools
import json
import shutil
import weakref

import pytest
import torch
import transformers
from helpers import ROOT, SHAPE, Scripted, baseline, counts_of, like, make_model, sd, speculate, with_more_tokens
from torch._dynamo.utils import counters
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROMPTS = [[5, 9, 70, 2, 40], [3], [79, 8], list(range(1, 31)), [11] * 12]  # of 1 to 30 tokens: a window is 8 long
NEW = 20
CAPACITY = max(map(len, PROMPTS)) + NEW + 5
GREEDY, SAMPLING = sd.Greedy(), sd.Sampling(0.9, top_k=20, top_p=0.9, seed=3)


class Replayed:
    """A traced graph that runs as a CUDA graph is replayed, but by Python.

    It finds its inputs where they were in its first run, and writes only into such as are known to stay there. The
    outputs of the graph before it are overwritten.
    """

    graphs, held = [], []  # all that were made; the outputs of the latest that ran

    def __init__(self, graph, inputs):
        self.graph, self.addresses = graph, None
        self.graphs.append(graph)

    def __call__(self, *inputs):
        for output in self.held:
            output.fill_(-1)
        versions = [None if part.is_inference() else part._version for part in inputs]
        self.held[:] = outputs = self.graph(*inputs)
        stays = [hasattr(part, "_dynamo_static_input_type") or isinstance(part, torch.nn.Parameter) for part in inputs]
        addresses = [part.data_ptr() for part in itertools.compress(inputs, stays)]
        self.addresses = self.addresses or addresses
        assert addresses == self.addresses
        written = [not part.is_inference() and part._version != was for part, was in zip(inputs, versions, strict=True)]
        assert sum(written) >= 3 and all(itertools.compress(stays, written))  # keys, values, lengths
        return outputs


@contextlib.contextmanager
def traced():
    """Within this, steps are traced as the program asks, and run by Python: much quicker to make than compiled code.

    The program drops the compiler's guards; here they are kept, so that what would compile anew is seen: all but one
    of a list of the library's, which grows with each family of models.
    """
    compile_for_real = torch.compile

    def trace(function, options, **how):
        assert options["triton.cudagraphs"] and options["guard_filter_fn"] is torch.compiler.skip_all_guards_unsafe
        kept = {"guard_filter_fn": lambda guards: ["_CAN_RECORD_REGISTRY" not in guard.name for guard in guards]}
        return compile_for_real(function, backend=Replayed, options=kept, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", trace)
        yield Replayed.graphs


def compiled(eager, sampler, *steps, into=None):
    """The model with steps of the sampler, each by its name and tokens; `into`: one that has others already."""
    cached = into or sd.CompiledModel(eager, CAPACITY)
    sd.compile_steps(cached, sampler, [(getattr(sampler, name), tokens) for name, tokens in steps], lambda line: None)
    return cached


def check_exact(compiled_pair, eager_pair, sampler=GREEDY, prompts=PROMPTS, lengths=(4, 2)):
    """With several K, of which all but the longest have their verify passes padded; one prompt after the other."""
    for number, prompt in enumerate(prompts):
        how = {"sampler": sampler, "number": number}
        own = baseline(eager_pair[0], prompt, NEW, **how).token_ids
        assert baseline(compiled_pair[0], prompt, NEW, **how).token_ids == own
        for k in lengths:
            schedule = sd.FixedSchedule(k, (lengths[0] + 1,))
            run, reference = (speculate(*each, prompt, schedule, NEW, **how) for each in (compiled_pair, eager_pair))
            assert (run.token_ids, counts_of(run)) == (reference.token_ids, counts_of(reference))
            assert run.log_likelihood == pytest.approx(reference.log_likelihood, rel=1e-4)


@pytest.fixture(scope="module")
def pair():
    """A main model and a draft with traced steps of two samplers. The draft has fewer tokens."""
    model = make_model("gemma2")
    main = sd.CompiledModel(sd.CachedModel(with_more_tokens(model)), CAPACITY)
    draft = sd.CompiledModel(sd.CachedModel(like(model, 0.02), None, 61), CAPACITY)
    with traced():
        compiled(main.eager, GREEDY, ("sample", 1), ("score", 5), into=main)
        compiled(draft.eager, GREEDY, ("sample_draft", 1), ("sample_draft", 2), into=draft)
        compiled(main.eager, SAMPLING, ("score", 5), into=main)
        compiled(draft.eager, SAMPLING, ("sample_draft", 2), into=draft)
    return main, draft


@pytest.mark.parametrize("sampler", [GREEDY, SAMPLING], ids=["greedy", "sampled"])
def test_compiled_decoding_is_exact_and_never_compiles_again(pair, sampler):
    """Past sliding windows, with prompts of 1 to 30 tokens, and tokens that only the main model has."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_exact(pair, [each.eager for each in pair], sampler)
    assert not any(
        weight.requires_grad for weight in pair[0].model.parameters()
    )  # graphs would keep what training needs


GEMMA4 = {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2, "head_dim": 8, "global_head_dim": 16}
GEMMA4 |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61}
KINDS = {
    "a mixture of experts": lambda: make_model("gpt_oss"),
    "layers that share keys and values": lambda: make_model(transformers.Gemma4TextConfig(**SHAPE | GEMMA4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_layers_are_exact_too(kind):
    model = KINDS[kind]()
    main, draft = sd.CachedModel(model), sd.CachedModel(like(model, 0.02))
    with traced():
        check_exact((compiled(main, GREEDY, ("sample", 1), ("score", 5)), draft), (main, draft), prompts=PROMPTS[3:])


# By the real compiler. Without an accelerator, it writes C++.


def test_what_is_really_compiled_is_exact(monkeypatch):
    """With products that are loops over the weights, which this program makes for large models."""
    monkeypatch.setattr(sd, "LARGE", 0)
    model = make_model("mistral")
    main, draft = sd.CachedModel(model), sd.CachedModel(like(model, 0.02))
    steps = compiled(main, GREEDY, ("sample", 1), ("score", 3))
    check_exact((steps, draft), (main, draft), prompts=([7, 8], [3], PROMPTS[3]), lengths=(2, 1))


def test_compiled_float16_runs_on_a_cpu():
    """What is compiled rounds less often: where that flips a token, both outputs are the main model's."""
    model = make_model(transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": 1}), dtype=torch.float16)
    main = sd.CachedModel(model)
    steps = compiled(main, GREEDY, ("sample", 1))
    for first in range(1, 21):
        ours, own = (baseline(one, [first, 7], NEW, sampler=GREEDY).token_ids for one in (steps, main))
        divergence = sd.find_divergence(main, (first, 7), own, ours)
        assert divergence is None or divergence.kind == "tie"


# Which steps run.


def note_passes(model, monkeypatch):
    """A list that grows with each step: (its tokens, whether it was compiled). Each compiled one is marked as a new."""
    passes, marked, eagerly = [], [], sd.CachedModel.step
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))

    def noting(key, step):
        def run(ids, uniform):
            assert marked and ids.shape == (1, key[1])
            marked.clear()
            passes.append((key[1], True))
            return step(ids, uniform)

        return run

    def note_eager(which, then, ids, *how, **further):
        passes.extend([(ids.shape[1], False)] if which is model else [])
        return eagerly(which, then, ids, *how, **further)

    for key, step in list(model.steps.items()):
        monkeypatch.setitem(model.steps, key, noting(key, step))
    monkeypatch.setattr(sd.CachedModel, "step", note_eager)
    return passes


def test_passes_of_the_main_model_are_padded_to_the_next_width(pair, monkeypatch):
    main, draft = pair
    passes = note_passes(main, monkeypatch)
    for prompt in PROMPTS:
        passes.clear()
        run = speculate(main, draft, prompt, Scripted(range(7), (5, 7)), NEW, sampler=GREEDY)
        assert run.token_ids == baseline(main.eager, prompt, NEW).token_ids
        # One token or five are compiled, and seven are not.
        drafted = [drafted for drafted, _ in counts_of(run)]
        assert passes == [(7, False) if k > 4 else (5, True) if k else (1, True) for k in drafted]


def test_a_draft_reads_what_it_has_missed_in_one_pass(pair, monkeypatch):
    """Two tokens are compiled, more are read eagerly. It drafts what it would without having missed any."""
    main, draft = pair
    passes = note_passes(draft, monkeypatch)
    script = (3, 0, 3, 0, 0, 0, 3, 3)
    for prompt in PROMPTS:
        passes.clear()
        run, reference = (
            speculate(*each, prompt, Scripted(script, (5,)), NEW, sampler=GREEDY)
            for each in (pair, [each.eager for each in pair])
        )
        assert (run.token_ids, counts_of(run)) == (reference.token_ids, counts_of(reference))
        expected, missed = [], 2
        for drafted, _ in counts_of(run):
            expected += [(missed, missed == 2), (1, True), (1, True)] if drafted else []
            missed = 2 if drafted else missed + 1
        assert passes == expected and any(tokens > 4 for tokens, _ in passes)


# Products of compiled steps on a CPU.


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 9), (torch.bfloat16, 1)], ids=str)
def test_a_loop_over_the_weights_gives_the_librarys_product(dtype, most, monkeypatch):
    """For few tokens, and for any that it is given; also of sizes that no number of streams divides."""
    torch.manual_seed(0)
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    streamed, called = sd.streamed_linear, []
    monkeypatch.setattr(sd, "streamed_linear", lambda *of: called.append(of[0].shape[-2]) or streamed(*of))
    for tokens, size, has_bias in itertools.product((*range(1, 11), 20), (1, 2, 3, 24, 61), (False, True)):
        x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((1, tokens, 40), (size, 40), (size,)))
        of = (x, weight, bias if has_bias else None)
        torch.testing.assert_close(streamed(*of), linear(*of), **tolerance)
        with sd.StreamedProducts():
            assert linear(*of).shape == linear(x[0], *of[1:])[None].shape == (1, tokens, size)
    assert set(called) == set(range(1, most + 1))


class Quantised(torch.Tensor):
    """Weights as libraries for quantised models have them: they say themselves how they are multiplied."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return "its own product"


def test_quantised_weights_are_multiplied_as_they_were():
    x, weight = torch.randn(1, 1, 8), torch.randn(3, 8)
    with sd.StreamedProducts():
        assert linear(x, weight.as_subclass(Quantised)) == "its own product"
        assert not linear(x.int(), weight.int()).is_floating_point()


def logits_of(logits, ids, uniform):
    return logits * 1


@pytest.mark.parametrize("is_large", [True, False])
def test_a_large_model_has_its_products_streamed(monkeypatch, is_large):
    """Also its head's, which is its embedding, too. The logits are the library's."""
    shape = SHAPE | {"num_hidden_layers": 1, "tie_word_embeddings": is_large}
    torch.manual_seed(0)
    eager = sd.CachedModel(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)))
    monkeypatch.setattr(sd, "LARGE", sum(weight.nbytes for weight in eager.model.parameters()) + (not is_large))
    cached = sd.CompiledModel(eager, 8)
    with traced() as graphs:
        cached.compile(logits_of, 1, None, 0)
    targets = [node.target for node in graphs[-1].graph.nodes]
    assert (targets.count(linear), targets.count("as_strided")) == ((0, 8) if is_large else (8, 0))
    cached.reset(), eager.reset()
    torch.testing.assert_close(*(each.step(logits_of, torch.tensor([[7]])) for each in (cached, eager)))


# What a run does where something, or everything, cannot be compiled.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with the bundled tokenizer. The positions of opt depend on what is read: no single graph is made."""
    shape, root = SHAPE | {"vocab_size": 2048, "num_hidden_layers": 1}, tmp_path_factory.mktemp("models")
    main = make_model(transformers.LlamaConfig(**shape))
    opt = make_model("opt")
    opt.resize_token_embeddings(2048)
    for name, model in (("main", main), ("draft", like(main, 0.02)), ("opt", opt)):
        model.save_pretrained(root / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "tests/tiny_gemma2/main" / file, root / name / file)
    (root / "prompts.txt").write_text("What does heapq.merge do?\nsort\n")
    return root


class Run:
    """A run of the program with --compile on: what it printed, what it has as JSON, and what it compiled."""

    def __init__(self, folders, monkeypatch, capsys):
        self.capsys, self.load, self.compile_steps = capsys, sd.load_model, sd.compile_steps
        self.models = {}  # weak references to them
        self.steps = {}  # by model: [(what is done with the logits, tokens), …]
        self.held = {}  # by model: which models are in memory when its steps are about to be compiled
        monkeypatch.setattr(sd, "load_model", self.note_model)
        monkeypatch.setattr(sd, "compile_steps", self.note_steps)
        monkeypatch.setattr(sd, "memory_bandwidth_gb_s", lambda device: 20.0)
        monkeypatch.chdir(folders)

    def __call__(self, main, draft, lengths, new=8):
        how = ["--prompts", "prompts.txt", "--warmup", "0", "--ignore-eos", "--max-new-tokens", str(new)]
        pair = ["--main", main, "--draft", draft, "--draft-tokens", lengths]
        self.status = sd.main([*pair, *how, "--compile", "on", "--json", "out.json"])
        self.printed, self.said = self.capsys.readouterr()
        with open("out.json") as file:
            report = json.load(file)
        self.is_compiled, self.outcomes = report["environment"]["compiled"], {}
        for label, outcome in [pair for prompt in report["prompts"] for pair in prompt["outcomes"].items()]:
            self.outcomes.setdefault(label, set()).add(outcome["verdict"] or outcome["error"])

    def note_model(self, files, *how):
        self.models[files.name] = weakref.ref(model := self.load(files, *how))
        return model

    def note_steps(self, model, sampler, steps, announce):
        name = model.model.name_or_path
        self.steps[name] = {(then.__name__, tokens) for then, tokens in steps}
        self.held[name] = {name for name, model in self.models.items() if model()}
        self.compile_steps(model, sampler, steps, announce)


@pytest.fixture
def run(folders, monkeypatch, capsys):
    return Run(folders, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("lengths", "new", "widths", "drafting"),
    [("1", 1, {2}, {2}), ("5,1", 7, {2, 6}, {1, 2}), ("20,auto", 2, {3, 5, 9, 16, 21}, {1, 2})],
)
def test_steps_are_those_that_rounds_need_and_the_cache_holds_the_longest_text(run, lengths, new, widths, drafting):
    """With K = 1 no draft reads one token. Nothing is compiled here: the steps run with the cache of fixed size."""
    run.compile_steps = lambda *how: None
    run("main", "draft", lengths, new)
    assert run.steps["main"] == {("sample", 1), *(("score", width) for width in widths)}
    assert run.steps["draft"] == {("sample_draft", tokens) for tokens in drafting}
    assert run.status == 0 and run.is_compiled and set().union(*run.outcomes.values()) == {"identical"}


def test_a_draft_that_cannot_be_compiled_is_a_row_and_gives_back_its_memory(run):
    with traced():
        run("main", "opt,draft,ngram", "3")
    assert run.status == 1 and run.is_compiled and "float32, compiled" in run.printed
    assert run.said.count("Compiling step ") == 5  # two of each, of which opt fails at the first
    assert run.held["opt"] == {"main", "opt", "draft"} and run.held["draft"] == {"main", "draft"}
    (reason,) = run.outcomes.pop("opt, K = 3")
    assert "data-dependent" in reason and "\n" not in reason
    assert run.outcomes == {label: {"identical"} for label in ("baseline", "draft, K = 3", "ngram, K = 3")}


def test_a_main_model_that_cannot_be_compiled_runs_eagerly_and_so_do_its_drafts(run):
    run("opt", "draft", "3")
    assert "warning" in run.printed and "data-dependent" in run.printed and "float32, eager" in run.printed
    assert run.status == 0 and not run.is_compiled and list(run.steps) == ["opt"]
    assert set().union(*run.outcomes.values()) == {"identical"}


@pytest.mark.parametrize("how", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "force_eager"])
def test_a_compiler_that_is_turned_off_is_told(run, how, monkeypatch):
    with contextlib.ExitStack() as off:
        if how == "TORCHDYNAMO_DISABLE":
            monkeypatch.setenv(how, "1")
        elif how == "TORCH_COMPILE_DISABLE":  # is read once, into this
            off.enter_context(torch._dynamo.config.patch(disable=True))
        else:
            off.enter_context(torch.compiler.set_stance(how))
        run("main", "draft", "3")
    assert "warning" in run.printed and "float32, eager" in run.printed
    assert run.status == 0 and run.is_compiled is False
    assert set().union(*run.outcomes.values()) == {"identical"}


def test_a_cache_of_another_kind_is_refused():
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2}
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**shape, vocab_size=61))
    with pytest.raises(NotImplementedError, match="mamba2"):
        sd.CompiledModel(sd.cached_model(model), CAPACITY)


@pytest.mark.parametrize(("device", "skipped", "warned"), [("cuda", 2, True), ("cuda", 0, False), ("cpu", 2, False)])
def test_steps_without_cuda_graphs_are_told(monkeypatch, device, skipped, warned):
    """The compiler counts what it skips; on a CPU, too, where there are no such graphs to be had."""
    main, announced = sd.CompiledModel(sd.CachedModel(make_model("llama")), CAPACITY), []
    monkeypatch.setattr(main, "compile", lambda *step: None)
    monkeypatch.setattr(main, "device", torch.device(device))
    monkeypatch.setitem(counters["inductor"], "cudagraph_skips", skipped)
    sd.compile_steps(main, GREEDY, [(GREEDY.sample, 1)], announced.append)
    assert ["warning" in line for line in announced] == [False, *[True] * warned]


class OneDevice(TorchDispatchMode):
    """Rejects operations that involve another device than that of meta tensors, from which nothing can be read."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        assert all(part.device.type == "meta" for part in tree_leaves((args, kwargs, output)) if torch.is_tensor(part))
        return output


class OnMeta(sd.Sampling):
    """Draws with random numbers that have no storage."""

    def uniform(self, count):
        return torch.empty(count, device="meta")


@pytest.mark.parametrize("sampler", [GREEDY, OnMeta(0.8, 5, 0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("is_fixed", [False, True], ids=["growing", "fixed"])
def test_drafting_and_verifying_read_nothing_from_the_device(is_fixed, sampler):
    """An accelerator would wait for each read. With either kind of cache."""
    model = make_model("gemma2").to("meta")
    main, draft = sd.CachedModel(model), sd.CachedModel(model)
    if is_fixed:
        main, draft = sd.CompiledModel(main, CAPACITY), sd.CompiledModel(draft, CAPACITY)
    helper, prompt = sd.ModelDraft(draft, sampler), torch.zeros(1, 7, dtype=torch.long, device="meta")
    last = sampler.sample(main.prefill(prompt), prompt, sampler.uniform(1))
    helper.reset(prompt)
    with OneDevice(), torch.no_grad():
        for schedule, text in ((sd.FixedSchedule(4), [1] * 8), (sd.AutoSchedule([1.0, 1.1, 1.2, 1.3, 1.4]), [1] * 10)):
            draft_ids, _ = helper.propose(text, schedule.draft_tokens)
            main.verify(sampler.score, torch.cat([last, draft_ids], dim=1), 5)
            main.roll_back(3), helper.roll_back(3)
            schedule.learn(4, 1)
        main.step(sampler.sample, last, sampler.uniform(1))
