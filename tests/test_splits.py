"""Every way to split a model, with everything coded that travels: real ranks answer as the simulation does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import narrowcast
from models import MORE, random_ids, save_random
from narrowcast import InvalidInputError, Plan
from narrowcast.engines import load_engine
from narrowcast.plan.split import KINDS, Split
from narrowcast.runtime.reports import Report
from ranks import Ranks

Pools = Callable[[int], Ranks]
transformers = load_engine()

EXPERTS = [Split(tp_size=2, experts="all_reduce"), Split(tp_size=4, experts="all_to_all")]
STAGES = [Split(pp_size=2), Split(tp_size=2, pp_size=2)]
CASES = [
    *(("mixtral", split) for split in (*EXPERTS, *STAGES)),
    *(("qwen3-moe", split) for split in EXPERTS),
    *(("llama-tied", split) for split in STAGES),
    *(("gemma2", split) for split in STAGES),
    ("phi3", Split(tp_size=2)),
    ("phi3-starved", Split(tp_size=4)),
    ("llama-starved", Split(tp_size=4)),
]


def answers(model: Any, plan: Plan, ids: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor, Report]:
    """Logits, a greedy continuation, and what was sent for the logits."""
    with torch.no_grad(), narrowcast.attach(model, plan, **options) as handle:
        logits = model(input_ids=ids, attention_mask=mask).logits
        report = handle.report()
        text = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    return logits, text, report


def on_rank(folder: Path, ids: Tensor, mask: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Report]:
    plan = Plan.load(folder / "plan")
    return answers(transformers.load(folder, split=plan.split), plan, ids, mask, **options)


def calibrated(folder: Path, split: Split, codec: Any, **options: Any) -> Plan:
    plan = narrowcast.calibrate(
        transformers.load(folder),
        [random_ids(8, 40, seed=1)],
        tp_size=split.tp_size,
        pp_size=split.pp_size,
        experts=split.experts,
        codec=codec,
        **options,
    )
    plan.save(folder / "plan", overwrite=True)
    return plan


def check(pools: Pools, folder: Path, plan: Plan, **options: Any) -> list[Report]:
    """Real ranks against the simulation; the reports of all ranks."""
    ids, mask = random_ids(3, 11), torch.ones(3, 11, dtype=torch.long)
    if plan.split.pp_size == 1:
        mask[1, :4] = 0
    logits, text, simulated = answers(transformers.load(folder), plan, ids, mask, simulate=True, **options)
    results = pools(plan.split.world_size).run(on_rank, folder, ids, mask, options)
    for found in results:
        assert torch.equal(found[0], logits)
        assert torch.equal(found[1], text)
    reports: list[Report] = [report for _, _, report in results]
    for name, site in simulated.sites.items():
        first = next(report for report in reports if name in report.sites and report.sites[name].wire_bytes)
        everywhere = [report.sites[name] for report in reports if name in report.sites]
        assert first.sites[name].counting(everywhere) == site, name
    assert sum(report.num_saturated for report in reports) == simulated.num_saturated
    return reports


@pytest.mark.parametrize(("name", "split"), CASES, ids=str)
def test_everything_coded_everywhere(ranks: Pools, tmp_path: Path, name: str, split: Split) -> None:
    folder = save_random(name, tmp_path / "model")
    plan = calibrated(folder, split, dict.fromkeys(KINDS, "int6-feature"))
    reports = check(ranks, folder, plan)
    assert all(not report.uncompressed_bytes_per_token for report in reports)
    assert {site.kind for site in plan.sites.values()} >= ({"boundary", "logits"} if split.pp_size > 1 else {"sum"})


@pytest.mark.parametrize(
    ("name", "split", "preset"),
    [
        ("phi3", Split(tp_size=4), "int4-group128"),  # columns that are cut within a group
        ("mixtral", Split(tp_size=2, experts="all_to_all"), "fp8"),
        ("qwen2", Split(tp_size=2, pp_size=2), "nvfp4"),
    ],
    ids=str,
)
def test_codecs_without_calibration_everywhere(
    ranks: Pools, tmp_path: Path, name: str, split: Split, preset: str
) -> None:
    folder = save_random(name, tmp_path / "model")
    check(ranks, folder, calibrated(folder, split, dict.fromkeys(KINDS, preset)))


GROUPS = [[0, 1], [2, 3]]


@pytest.mark.parametrize("within", ["bf16", "int8-feature"])
def test_sums_within_nodes_first(ranks: Pools, tmp_path: Path, within: str) -> None:
    """Per token and rank: two halves within the node, the node's half between nodes, and one half within again."""
    folder = save_random("llama-biased", tmp_path / "model")
    plan = calibrated(folder, Split(tp_size=4), "int4-feature", groups=GROUPS, within=within)
    reports = check(ranks, folder, plan)
    assert {len(site.codecs) for site in plan.sites.values()} == {3}
    assert all({"one_shot", "two_shot", "hierarchical"} <= site.error.keys() for site in plan.sites.values())
    assert check(ranks, folder, plan, algorithm="one_shot")[0].bits_per_value != reports[0].bits_per_value
    half, coded = 96 * (2 if within == "bf16" else 1) / 2, (2 + 48) / 2
    site = reports[0].sites["model.layers.0.mlp.down_proj"]
    extra = 0 if within == "bf16" else 1  # one of the 96 features travels in BF16
    assert site.wire_bytes / site.num_tokens == pytest.approx(2 * half + coded + extra, rel=0.1)


def test_a_plan_for_nodes_is_made_on_ranks_too(ranks: Pools, tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "model")
    plan = calibrated(folder, Split(tp_size=4), "int4-feature", groups=GROUPS)
    assert set(ranks(4).run(calibrate_for_nodes, folder)) == {plan.fingerprint}


def calibrate_for_nodes(folder: Path) -> str:
    model = transformers.load(folder, split=Split(tp_size=4))
    return narrowcast.calibrate(model, [random_ids(8, 40, seed=1)], groups=GROUPS, codec="int4-feature").fingerprint


@pytest.mark.parametrize("name", ["phi3", "mixtral"])
def test_counting_only_sends_what_the_model_sends(ranks: Pools, tmp_path: Path, name: str) -> None:
    """The report is that of the coded model, the answers are those of the uncoded one."""
    folder = save_random(name, tmp_path / "model")
    ids = random_ids(2, 9)
    uncoded = calibrated(folder, Split(tp_size=2), "bf16")
    expected = ranks(2).run(on_rank, folder, ids, torch.ones_like(ids), {})
    plan = calibrated(folder, Split(tp_size=2), dict.fromkeys((*KINDS, "last"), "int4-feature"))
    coded = ranks(2).run(on_rank, folder, ids, torch.ones_like(ids), {})
    counted = ranks(2).run(on_rank, folder, ids, torch.ones_like(ids), {"count_only": True})
    for (logits, text, _), (_, _, report), (found, continued, only) in zip(expected, coded, counted, strict=True):
        assert torch.equal(found, logits) and torch.equal(continued, text)
        assert only.sites == {name: site.counting([]) for name, site in report.sites.items()}  # nothing is clipped
        assert report.bits_per_value is not None and report.bits_per_value < 4.5
    model = transformers.load(folder)
    assert (
        answers(model, plan, ids, torch.ones_like(ids), simulate=True, count_only=True)[2].sites == counted[0][2].sites
    )
    plain = answers(model, uncoded, ids, torch.ones_like(ids), simulate=True)[2]
    assert {name: site.plain_bytes for name, site in counted[0][2].sites.items()} == {
        name: site.wire_bytes for name, site in plain.sites.items()
    }


def test_splits_that_a_model_cannot_take_are_refused(tmp_path: Path) -> None:
    dense = transformers.load(save_random("llama", tmp_path / "dense"))
    sparse = transformers.load(save_random("mixtral", tmp_path / "sparse"))
    whole = {"tp_size": 2, "experts": "all_reduce"}
    for model, options, match in (
        (dense, {"pp_size": 3}, "at least as many layers, in a list named layers, found 2"),
        (dense, whole, "found a model without experts. Leave it out"),
        (sparse, whole | {"tp_size": 3}, "model.layers.0.mlp.experts: .* that 3 ranks divide, found 4"),
        (sparse, whole | {"pp_size": 2}, "whole experts, or a pipeline"),
        (sparse, whole | {"experts": "some"}, "one of slices, all_reduce, all_to_all, found 2, 1, 'some'"),
        (dense, {"tp_size": 2, "codec": {"dispatch": "bf16"}}, "one for embedding or logits or sum, found .* dispatch"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            narrowcast.calibrate(model, [random_ids(1, 8)], **options)


def generated(model: Any, plan: Plan, **options: Any) -> list[Tensor]:
    """Padded prompts continued with each kind of cache, in chunks, by beams; and further, from the cache of before."""
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    common: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), narrowcast.attach(model, plan, **options):
        found = [
            model.generate(ids, attention_mask=mask, **common, **ways)
            for ways in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"num_beams": 2})
        ]
        first = model.generate(ids, **common, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, random_ids(2, 5, seed=1)], dim=1)
        cache = copy.deepcopy(first.past_key_values)
        found.append(model.generate(longer, past_key_values=cache, **common))
        cache = model(ids).past_key_values
        return [*found, model(random_ids(2, 5, seed=1), past_key_values=cache).logits]


def generated_on_rank(folder: Path) -> list[Tensor]:
    plan = Plan.load(folder / "plan")
    return generated(transformers.load(folder, split=plan.split), plan)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", *MORE])
def test_caches_of_every_kind_in_a_pipeline(ranks: Pools, tmp_path: Path, name: str) -> None:
    """Whatever asks a cache for lengths asks the model's first layers, which later stages do not hold."""
    folder = save_random(name, tmp_path / "model")
    plan = calibrated(folder, Split(pp_size=2), "int8-feature")
    expected = generated(transformers.load(folder), plan, simulate=True)
    for found in ranks(2).run(generated_on_rank, folder):
        assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True] * len(expected)


def refuse_all_but_logits(folder: Path) -> None:
    plan, ids = Plan.load(folder / "plan"), random_ids(2, 8)
    model: Any = transformers.load(folder, split=plan.split)
    with narrowcast.attach(model, plan):
        for asked in ({"labels": ids}, {"output_hidden_states": True}):
            with pytest.raises(InvalidInputError, match=f"a forward for logits, found {min(asked)}"):
                model(ids, **asked)
        model(ids, labels=None, output_hidden_states=False)


def test_a_pipeline_gives_logits_alone(ranks: Pools, tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "model")
    calibrated(folder, Split(pp_size=2), "int8-feature")
    ranks(2).run(refuse_all_but_logits, folder)


def test_attach_wants_the_split_of_the_plan(ranks: Pools, tmp_path: Path) -> None:
    folder = save_random("mixtral", tmp_path / "model")
    calibrated(folder, Split(tp_size=2, experts="all_reduce"), "int8-feature")
    ranks(2).run(attach_to_slices, folder)


def attach_to_slices(folder: Path) -> None:
    model = transformers.load(folder, split=Split(tp_size=2))
    with pytest.raises(
        InvalidInputError, match=r"whole experts \(all_reduce\), for which .* found tp_size 2. Calibrate"
    ):
        narrowcast.attach(model, Plan.load(folder / "plan"))


def batch_continuously(model: Any, plan: Plan, **options: Any) -> list[list[int]]:
    """Paged attention, requests of different lengths in one batch."""
    from transformers.generation import ContinuousBatchingConfig, GenerationConfig

    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 17, 9, 5, 12, 8)]
    config = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=24)
    with torch.no_grad(), narrowcast.attach(model, plan, **options):
        found = model.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=config,
            progress_bar=False,
        )
    return [found[key].generated_tokens for key in sorted(found)]


def batch_on_rank(folder: Path) -> list[list[int]]:
    plan = Plan.load(folder / "plan")
    return batch_continuously(transformers.load(folder, split=plan.split), plan)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "qwen3-moe"])
def test_continuous_batching_with_paged_attention(ranks: Pools, tmp_path: Path, name: str) -> None:
    folder = save_random(name, tmp_path / "model")
    plan = calibrated(folder, Split(tp_size=2), "int6-feature")
    expected = batch_continuously(transformers.load(folder), plan, simulate=True)
    assert len(expected) == 6 and all(len(tokens) == 6 for tokens in expected)
    for found in ranks(2).run(batch_on_rank, folder):
        assert found == expected
