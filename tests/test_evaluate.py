"""Scores against formulas written out, and against PyTorch's and Transformers' own losses."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import narrowcast
from models import random_ids, save_random
from narrowcast.evaluate import compare, log_probs
from narrowcast.integrations import load_engine


def test_scores_written_out() -> None:
    """Two tokens, a vocabulary of two: KL, agreement and perplexity by hand."""
    reference = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    found = torch.tensor([[[0.25, 0.75], [0.8, 0.2]]]).log()
    score = compare([reference], [found], [torch.tensor([[0, 1]])])
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.1 / 0.2)
    assert score.kl_nats == pytest.approx((first + second) / 2, abs=1e-6)
    assert score.top1_agreement == 0.5  # argmax of a tie is the first
    assert score.perplexity == pytest.approx(1 / 0.75, rel=1e-6)  # token 1 is predicted with 0.75
    assert score.num_tokens == 2


def test_scores_of_a_model_agree_with_other_implementations(tmp_path: Path) -> None:
    model = load_engine().load(save_random("llama", tmp_path / "model", torch.float32))
    batches = [random_ids(2, 20), random_ids(1, 9, seed=1)]
    reference = [log_probs(model, ids) for ids in batches]
    plan = narrowcast.calibrate(model, batches, tp_size=2, codec="int3-feature")
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True):
        score = compare(reference, [log_probs(model, ids) for ids in batches], batches)
        found = [model(ids).logits for ids in batches]
        losses = [model(ids, labels=ids).loss.item() * ids[:, 1:].numel() for ids in batches]
    kl = sum(
        functional.kl_div(logits.log_softmax(-1), expected, reduction="sum", log_target=True).item()
        for logits, expected in zip(found, reference, strict=True)
    )
    assert score.kl_nats == pytest.approx(kl / 49, rel=1e-4)
    assert score.perplexity == pytest.approx(math.exp(sum(losses) / (38 + 8)), rel=1e-5)
    assert 0 < score.top1_agreement < 1


def test_a_model_scores_zero_against_itself(tmp_path: Path) -> None:
    model = load_engine().load(save_random("llama", tmp_path / "model", torch.float32))
    batches = [random_ids(2, 20)]
    score = compare(*[[log_probs(model, ids) for ids in batches] for _ in range(2)], batches)
    assert score.kl_nats == pytest.approx(0, abs=1e-9)
    assert score.top1_agreement == 1
