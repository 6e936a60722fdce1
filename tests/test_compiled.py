"""Compiled decoding on the CPU: the same tokens, and nothing is compiled anew once all steps are."""

import functools

import pytest
import torch
from conftest import alone, ids_of, like, make_model, speculate

import speculative_decoding as sd

PROMPTS = [[5, 9, 13, 2, 40], [3], [7, 8], list(range(1, 31)), [11] * 12]  # of 1 to 30 tokens: a window is 8 long
NEW = 20


def compiled(model, rule, *steps):
    cached = sd.CachedModel(model)
    cached.fix_size(max(map(len, PROMPTS)) + NEW + 5)
    for choose, tokens, last in steps:
        cached.compile(choose, tokens, rule.uniform(1) if last else None, last)
    return cached


def compiled_pair(rule):
    model = make_model("gemma2")
    main = compiled(model, rule, (rule.next_token, 1, 1), (rule.judge, 1, 0), (rule.judge, 5, 0))
    return model, like(model, 0.05), main, compiled(like(model, 0.05), rule, (rule.guess, 1, 1), (rule.guess, 2, 1))


def test_compiled_is_exact_and_never_compiles_again(monkeypatch):
    """By the real compiler: sliding windows, prompts of 1 to 30 tokens, and every kind of step.

    The program drops the compiler's guards; here they are kept, so that one that would ask for compiling anew is seen.
    """
    monkeypatch.setattr(torch.compiler, "skip_all_guards_unsafe", lambda guards: [True] * len(guards))
    rule = sd.Greedy()
    model, draft_model, main, draft = compiled_pair(rule)
    storage = [layer.keys.data_ptr() for layer in main.cache.layers]
    chooser = sd.AutoLength(4, {"draft_pass_s": {1: 0.1, 2: 0.1}, "main_pass_s": {1: 1.0, 5: 1.2}})
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompt in PROMPTS:
            expected = alone(model, prompt, NEW).token_ids
            assert alone(main, prompt, NEW).token_ids == expected
            fixed, padded, auto = (speculate(main, draft, prompt, length, NEW) for length in (4, 2, chooser))
            assert fixed.token_ids == padded.token_ids == auto.token_ids == expected
            reference = speculate(model, draft_model, prompt, 2, NEW)
            assert padded.rounds == reference.rounds
            assert padded.log_likelihood == pytest.approx(reference.log_likelihood, rel=1e-4)
    assert storage == [layer.keys.data_ptr() for layer in main.cache.layers]  # no new storage between prompts


def test_drawing_can_be_compiled_too(monkeypatch):
    """The same draws as eagerly, with the graphs as they are traced, run by Python: quicker to make. Without guards."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    unguarded = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    trace = functools.partial(torch.compile, backend=keep, fullgraph=True, dynamic=False, options=unguarded)
    monkeypatch.setattr(torch, "compile", lambda function, **_: trace(function, isolate_recompiles=True))
    rule = sd.Sampling(0.9, top_k=20, top_p=0.9, seed=3)
    model, draft_model, main, draft = compiled_pair(rule)
    assert len(graphs) == 5
    assert not any(weight.requires_grad for weight in model.parameters())  # or graphs would keep what training needs
    for number, prompt in enumerate(PROMPTS):
        for k in (4, 2):
            expected = speculate(model, draft_model, prompt, k, NEW, rule=rule, number=number)
            result = speculate(main, draft, prompt, k, NEW, rule=rule, number=number)
            assert (result.token_ids, result.rounds) == (expected.token_ids, expected.rounds)
        baseline = alone(main, prompt, NEW, rule=rule, number=number).token_ids
        assert baseline == alone(model, prompt, NEW, rule=rule, number=number).token_ids
    assert len(graphs) == 5  # one for each kind of step and number of tokens, and none since


def test_compiled_steps_round_differently_and_that_is_a_tie():
    """In bfloat16 what is compiled rounds less often: the noise is that of the steps that ran, or ties look wrong."""
    model = make_model("llama", dtype=torch.bfloat16)
    rule = sd.Greedy()
    main = compiled(model, rule, (rule.next_token, 1, 1))
    kinds = []
    for first in range(1, 40):
        ours, own = (alone(one, [first, 7], NEW).token_ids for one in (main, model))
        if divergence := sd.find_divergence(main, ids_of([first, 7]), own, ours):
            kinds.append(divergence.kind)
    assert len(kinds) >= 5 and set(kinds) == {"tie"}
