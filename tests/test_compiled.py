"""Compiled decoding on the CPU: the same tokens, and nothing is compiled anew once all steps are."""

import pytest
import torch
from conftest import ROOT, like, make_model

import speculative_decoding as sd

PROMPTS = [[5, 9, 13, 2, 40], [3], [7, 8], list(range(1, 31)), [11] * 12]
NEW = 20


def test_compiled_is_exact_and_never_compiles_again():
    """A model with sliding windows of 8 tokens, prompts of 1 to 30, and every kind of step."""
    model = make_model("gemma2")
    eager, draft_model = sd.CachedModel(model), like(model, 0.05)
    main, draft = sd.CachedModel(model), sd.CachedModel(draft_model)
    main.compile(max(map(len, PROMPTS)) + NEW + 5, {"next_token": {1}, "verify": {1, 5}})
    draft.compile(max(map(len, PROMPTS)) + NEW + 5, {"guess": {1, 2}})
    storage = [layer.keys.data_ptr() for layer in main.cache.layers]
    chooser = sd.AutoLength(4, sd.Costs({1: 0.1, 2: 0.1}, {1: 1.0, 5: 1.2}))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            expected = sd.greedy_decode(eager, ids, NEW, set()).token_ids
            assert sd.greedy_decode(main, ids, NEW, set()).token_ids == expected
            fixed = sd.speculative_decode(main, draft, ids, NEW, set(), sd.FixedLength(4))
            padded = sd.speculative_decode(main, draft, ids, NEW, set(), sd.FixedLength(2))
            auto = sd.speculative_decode(main, draft, ids, NEW, set(), chooser)
            assert fixed.token_ids == padded.token_ids == auto.token_ids == expected
            reference = sd.speculative_decode(eager, sd.CachedModel(draft_model), ids, NEW, set(), sd.FixedLength(2))
            assert padded.rounds == reference.rounds
            assert padded.log_likelihood == pytest.approx(reference.log_likelihood, rel=1e-4)
    assert storage == [layer.keys.data_ptr() for layer in main.cache.layers]  # no new storage between prompts
