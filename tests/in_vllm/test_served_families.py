"""Plans that were calibrated with Transformers fit the same models in vLLM: names, fingerprints, answers."""

from pathlib import Path

import pytest

from narrowcast.plan import Plan
from running import differences, ordinary, run, simulated

FAMILIES = "llama-biased", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3-moe"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_serves_both_engines(folder: Path, family: str) -> None:
    """In FP32 answers are the same, but for few tokens: where a coded value falls one level apart, and after that."""
    ordinary("random", folder, family)
    model, plan = str(folder / family), f"{family}.plan"
    served = run(folder, family, {"model": model, "eager": True, "served": True}, NARROWCAST_PLAN=str(folder / plan))
    sites = Plan.load(folder / plan).sites
    (first, *_) = served.answers["reports"]
    assert {name for name, site in first["sites"].items() if site["coded"]} == sites.keys()
    assert f"at {len(sites)} sums, over tcp" in served.log
    expected = simulated(served, folder, plan, model)
    apart = differences(served.scores, expected["planned"])
    assert sum(each > 1e-4 for each in apart) < len(apart) / 3
    assert sum(apart) < sum(differences(served.scores, expected["exact"])) / 10
    assert max(differences(expected["exact"], expected["planned"])) > 0.1, "a check that can fail"
