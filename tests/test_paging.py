"""Requests that run together over a paged cache: each has the answer that it would have alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import MODEL
from models import random_ids, save_random
from narrowcast import InvalidInputError
from narrowcast.engines import Pages, load_engine
from narrowcast.evaluation.continuations import continuations
from narrowcast.plan.split import Split
from ranks import Ranks


def likeliest(prompts: Sequence[list[int]], num_tokens: int, pages: Pages) -> list[list[int]]:
    """The tokens that requests have which run together, and whose tokens are the likeliest."""
    said: dict[str, list[int]] = {}
    for place, ids in enumerate(prompts):
        pages.add(str(place), ids)
        said[str(place)] = []
    for _ in range(10 * len(prompts) * num_tokens):
        names, logits_NV = pages.forward()
        tokens = logits_NV.argmax(dim=-1).tolist() if names else []
        pages.take(tokens)
        for name, token in zip(names, tokens, strict=True):
            said[name].append(token)
            if len(said[name]) == num_tokens:
                pages.remove(name)
        if min(map(len, said.values())) == num_tokens:
            break
    return list(said.values())


def test_room_that_is_too_small_for_all_at_once_changes_no_answer() -> None:
    """Two of four requests fit; the others are put off, or lose their place and are read again."""
    model = load_engine().load(MODEL, dtype="float32")
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 4, 5, 7)]
    expected = [continuations(model, [torch.tensor([ids])], 40)[0] for ids in prompts]
    pages = load_engine().pages(model, num_tokens=128, max_requests=4, max_batch_tokens=16)
    assert likeliest(prompts, 40, pages) == expected


def test_room_is_used_by_requests_alone() -> None:
    """Two of four pages, and none once the request is removed, though they are kept for one that begins alike."""
    pages = load_engine().pages(
        load_engine().load(MODEL, dtype="float32"), num_tokens=128, max_requests=4, max_batch_tokens=64
    )
    assert pages.usage() == 0
    for _ in range(2):
        pages.add("one", random_ids(1, 40)[0].tolist())
        pages.forward()
        assert pages.usage() == 0.5
        pages.take([5])
        pages.remove("one")
        pages.forward()
        assert pages.usage() == 0


def test_weights_in_few_bits_answer_alike() -> None:
    """Tokens come as int32, with which a few-bit embedding is looked up, too."""
    model = load_engine().load(MODEL, dtype="float32", weights="int4-group32")
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 11)]
    expected = [continuations(model, [torch.tensor([ids])], 10)[0] for ids in prompts]
    pages = load_engine().pages(model, num_tokens=128, max_requests=4, max_batch_tokens=16)
    assert likeliest(prompts, 10, pages) == expected


def answers(folder: Path, tp_size: int, prompts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    engine = load_engine()
    model = engine.load(folder, split=Split(tp_size=tp_size))
    pages = engine.pages(model, num_tokens=256, max_requests=4, max_batch_tokens=32)
    said = likeliest(prompts, 10, pages)
    pages.score(prompts[2][:30], begins=True)
    return said, pages.score(prompts[2][30:], begins=False)


# Plain; a sliding window; capped scores; experts; keys of all heads on every rank, one by one and fused.
@pytest.mark.parametrize("name", ["llama-biased", "mistral", "gemma2", "mixtral", "olmo2", "phi3"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_families_answer_together_as_one_by_one(
    ranks: Callable[[int], Ranks], tmp_path: Path, name: str, tp_size: int
) -> None:
    """What is scored in two parts, the second of which is a step, is what one forward gives."""
    folder = save_random(name, tmp_path / "model", torch.float32)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 11, 40)]
    model: Any = load_engine().load(folder)
    expected = [continuations(model, [torch.tensor([ids])], 10)[0] for ids in prompts]
    with torch.no_grad():
        logits = model(torch.tensor([prompts[2]])).logits[0].float()
    for said, scores in ranks(tp_size).run(answers, folder, tp_size, prompts):
        assert said == expected
        torch.testing.assert_close(scores, logits[30:], atol=1e-5, rtol=0)  # FP32 sums of some hundred values near 1


def test_models_with_other_states_than_keys_and_values_are_refused(tmp_path: Path) -> None:
    model = load_engine().load(save_random("qwen3-next", tmp_path / "model", torch.float32))
    with pytest.raises(InvalidInputError, match=r"found one that it does not: Invalid layer type: linear_attention\."):
        load_engine().pages(model, num_tokens=256, max_requests=4, max_batch_tokens=32)
