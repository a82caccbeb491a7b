"""Ways of vLLM beside which a plan is at work: what is cached, guessed, adapted, in few bits, split otherwise."""

import statistics
from pathlib import Path

from narrowcast.plan import Plan
from running import MODEL, differences, ordinary, run, share_alike, simulated
from sums import as_simulated

SHARED = [(7 * place + 11) % 500 + 5 for place in range(100)]
TAILS = [[(13 * place + 31 * length) % 400 + 5 for place in range(length)] for length in (5, 12, 1, 9)]
PROMPTS = [SHARED + tail for tail in TAILS]
CODEC = {"NARROWCAST_CODEC": "int8-group128"}


def test_what_is_cached_or_guessed_is_what_would_be_computed(folder: Path) -> None:
    """A prompt's beginning is read from the cache, tokens are guessed and checked, alone or beside other requests."""
    asked = {
        "model": MODEL,
        "eager": True,
        "served": True,
        "record": True,
        "rounds": [PROMPTS, *([prompt] for prompt in PROMPTS)],
        "answers_alone": True,
        "num_tokens": [24] * 4,
        "options": {
            "max_model_len": 256,
            "block_size": 32,
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
        },
    }
    served = run(folder, "cached", asked, NARROWCAST_PLAN=str(folder / "int4.plan"))
    as_simulated(served, Plan.load(folder / "int4.plan"))
    together, alone = (served.answers["tokens"][place : place + 4] for place in (0, 4))
    assert together == alone
    assert served.answers["cached"][4:] == [96] * 4
    expected = simulated(served, folder)
    close, exact = (differences(served.scores, expected[name]) for name in ("planned", "exact"))
    assert statistics.mean(close) < statistics.mean(exact) / 2, "values one level apart add up over so many tokens"


def test_an_adapter_is_added_before_sums_travel(folder: Path) -> None:
    ordinary("adapter", folder)
    asked = {
        "model": MODEL,
        "eager": True,
        "served": True,
        "record": True,
        "answers_alone": True,  # vLLM's scores of prompts fail beside an adapter on the CPU
        "num_tokens": [24] * 3,
        "adapter": str(folder / "adapter"),
        "options": {"enable_lora": True, "max_lora_rank": 8},
    }
    served = run(folder, "adapted", asked, NARROWCAST_PLAN=str(folder / "int4.plan"))
    as_simulated(served, Plan.load(folder / "int4.plan"))
    expected = simulated(served, folder, model=str(folder / "merged"))
    close, exact = (differences(served.scores, expected[name]) for name in ("planned", "exact"))
    assert statistics.mean(close) < statistics.mean(exact) / 4


def test_weights_in_four_bits(folder: Path) -> None:
    """The same folder for both engines; vLLM computes with it in BF16."""
    ordinary("quantized", folder, "w4a16")
    options = {"dtype": "bfloat16"}
    asked = {"model": str(folder / "w4a16"), "eager": True, "served": True, "record": True, "options": options}
    served = run(folder, "w4a16", asked, NARROWCAST_PLAN=str(folder / "w4a16.plan"))
    as_simulated(served, Plan.load(folder / "w4a16.plan"))
    expected = simulated(served, folder, "w4a16.plan", str(folder / "w4a16"))
    close, exact = (differences(served.scores, expected[name]) for name in ("planned", "exact"))
    assert statistics.mean(close) < statistics.mean(exact)


def test_stages_of_a_pipeline_send_with_one_codec(folder: Path) -> None:
    """Compiled: on the CPU vLLM has no pipelines without."""
    asked = {"model": MODEL, "eager": False, "served": True, "options": {"pipeline_parallel_size": 2}}
    served = run(folder, "pipeline", asked, **CODEC)
    sites = [{name for name, site in each["sites"].items() if site["coded"]} for each in served.answers["reports"]]
    assert sites[0] == sites[1] and sites[2] == sites[3]
    assert len(sites[0]) == len(sites[2]) == 8 and not sites[0] & sites[2]
    apart = differences(served.scores, simulated(served, folder)["exact"])
    assert 1e-4 < statistics.mean(apart) < 0.03


def test_stages_of_a_pipeline_serve_a_plan(folder: Path) -> None:
    """Each its own chain of feedback, as the plan has them: the same answers as simulated."""
    asked = {"model": MODEL, "eager": False, "served": True, "options": {"pipeline_parallel_size": 2}}
    served = run(folder, "stages", asked, NARROWCAST_PLAN=str(folder / "stages.plan"))
    sites = [{name for name, site in each["sites"].items() if site["coded"]} for each in served.answers["reports"]]
    plan = Plan.load(folder / "stages.plan")
    assert [sites[0], sites[2]] == list(map(set, plan.feedback.chains)) and sites[1::2] == sites[::2]
    expected = simulated(served, folder, "stages.plan")
    apart, *others = (differences(served.scores, expected[name]) for name in ("planned", "exact", "without feedback"))
    assert share_alike(apart) > 0.25
    for other in others:
        assert statistics.mean(apart) < statistics.mean(other) / 4


def test_experts_are_coded_without_a_plan(served_by_vllm: None, tmp_path: Path) -> None:
    ordinary("random", tmp_path, "mixtral")
    model = str(tmp_path / "mixtral")
    served = run(tmp_path, "experts", {"model": model, "eager": True, "served": True}, **CODEC)
    sites = served.answers["reports"][0]["sites"]
    coded = [name for name, site in sites.items() if site["coded"]]
    assert len(coded) == 6 and sum("experts" in name for name in coded) == 3
    apart = differences(served.scores, simulated(served, tmp_path, "mixtral.plan", model)["exact"])
    assert 1e-4 < statistics.mean(apart) < 0.1
