"""attach: a model on real ranks answers as its one-process simulation does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import narrowcast
from models import CONFIGS, random_ids, save_random
from narrowcast import Plan
from narrowcast.integrations import load_engine
from ranks import Ranks

transformers = load_engine()


def on_rank(folder: Path, plan: Path, ids: Tensor, mask: Tensor, algorithm: str) -> dict[str, Any]:
    """Runs on each rank: logits before, during and after attach, and a greedy continuation."""
    model = transformers.load(folder, tp_size=dist.get_world_size())
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
        with narrowcast.attach(model, Plan.load(plan), algorithm=algorithm) as handle:
            during = model(input_ids=ids, attention_mask=mask).logits
            report = handle.report()
            text = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        after = model(input_ids=ids, attention_mask=mask).logits
    restored = forwards == {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    return {
        "before": before,
        "during": during,
        "after": after,
        "text": text,
        "report": report,
        "restored": restored,
    }


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("name", CONFIGS)
def test_real_ranks_equal_the_simulation(
    ranks: Callable[[int], Ranks], tmp_path: Path, name: str, algorithm: str, world_size: int
) -> None:
    folder = save_random(name, tmp_path / "model")
    whole = transformers.load(folder)
    ids, mask = random_ids(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[1, :5] = 0
    plan = narrowcast.calibrate(whole, [random_ids(8, 40, seed=1)], tp_size=world_size)
    plan.save(tmp_path / "plan")
    with torch.no_grad(), narrowcast.attach(whole, plan, simulate=True, algorithm=algorithm) as handle:
        expected = whole(input_ids=ids, attention_mask=mask).logits
        report = handle.report()
        text = whole.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)

    results = ranks(world_size).run(on_rank, folder, tmp_path / "plan", ids, mask, algorithm)
    for result in results:
        print((result["during"] - expected).abs().max(), expected.abs().max(), (result["text"] == text).float().mean())
        assert torch.equal(result["during"], results[0]["during"])
        assert torch.equal(result["before"], result["after"]) and result["restored"]
        assert result["report"].bits_per_value == pytest.approx(report.bits_per_value)
    assert torch.equal(results[0]["during"], expected)
    assert torch.equal(results[0]["text"], text)
