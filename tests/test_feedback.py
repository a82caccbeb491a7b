"""Depth feedback: what is lost at one site is made good at the next, on real ranks and virtual ones bit for bit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GraniteConfig

import narrowcast
from models import CONFIGS, SMALL, calibrated, random_ids
from narrowcast.calibration import CodecByKind, observe
from narrowcast.calibration.observing import CodedWires
from narrowcast.calibration.stream import BEHIND, chains_of
from narrowcast.codecs import Codec, Ranges, recipe
from narrowcast.collectives import ALGORITHMS
from narrowcast.engines import load_engine
from narrowcast.errors import InvalidInputError
from narrowcast.plan import ModelFingerprint, Plan, Site
from narrowcast.plan.chains import TURNED_OFF, Chains
from narrowcast.plan.decisions import Choice, Decisions
from narrowcast.plan.split import Split
from narrowcast.plan.summary import codec_name
from narrowcast.runtime.communicator import Communicator
from narrowcast.runtime.feedback import FeedbackCodec
from narrowcast.runtime.planned import PlannedWires
from narrowcast.runtime.simulator import Simulator
from narrowcast.runtime.sites import Sites
from narrowcast.transport import TorchDistributedTransport
from ranks import Ranks

NUM_FEATURES, NUM_SITES = 160, 4
SITES = [f"layers.{index}" for index in range(NUM_SITES)]
CPU = torch.device("cpu")
Pools = Callable[[int], Ranks]


def values(site: int, world_size: int, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Partial sums [R, T, E] of a site."""
    generator = torch.Generator().manual_seed(site)
    return torch.randn(world_size, num_tokens, NUM_FEATURES, generator=generator).to(dtype)


def codecs_of(preset: str, world_size: int, groups: Sequence[Sequence[int]]) -> tuple[Codec, ...]:
    seen = values(99, world_size, 200, torch.float32)
    codecs = calibrated(preset, seen)
    if not groups:
        return codecs
    return (*codecs, recipe(preset).codec(Ranges.of(torch.stack([seen[list(group)].sum(0) for group in groups]))))


def sites(
    preset: str,
    world_size: int,
    algorithm: str,
    *,
    chains: Sequence[Sequence[str]] = (SITES,),
    decisions: Decisions = Decisions(),
) -> Sites:
    groups = [range(rank, min(rank + 2, world_size)) for rank in range(0, world_size, 2)]
    nodes = groups if algorithm == "hierarchical" else []
    codecs = dict.fromkeys(SITES, codecs_of(preset, world_size, nodes))
    return Sites(codecs, nodes, algorithm, CPU, chains=Chains(chains=tuple(map(tuple, chains))), decisions=decisions)


def simulated(found: Sites, world_size: int, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """The sums of all sites, in one forward."""
    simulator = Simulator(found, world_size)
    return forward(simulator, [values(site, world_size, num_tokens, dtype) for site in range(NUM_SITES)])


def forward(wires: PlannedWires, given: Sequence[Tensor]) -> list[Tensor]:
    return [wires.partial_sums(name)(x) for name, x in zip(SITES, given, strict=True)]


# --- What is lost comes back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("preset", ["int4-feature", "int4-group32-sym", "feature(bits=3)"])
def test_the_stream_lacks_what_the_last_site_lost_alone(preset: str, algorithm: str) -> None:
    """Sums over sites telescope: in FP32 they are those of exact sums, less one loss and not four."""
    exact = sum(values(site, 3, 7, torch.float32).sum(0) for site in range(NUM_SITES))
    fed, plain = (
        (sum(simulated(sites(preset, 3, algorithm, chains=chains), 3, 7, torch.float32)) - exact).norm()
        for chains in ([SITES], [])
    )
    last = simulated(sites(preset, 3, algorithm, chains=[]), 3, 7, torch.float32)[-1]
    alone = (last - values(3, 3, 7, torch.float32).sum(0)).norm()
    assert fed < 0.75 * plain
    assert fed < 1.4 * alone  # the last site codes what was lost before besides


def test_a_codec_that_feeds_back_codes_the_sum_of_both_and_keeps_the_rest() -> None:
    codec, _ = calibrated("int4-feature", values(99, 2, 200, torch.float32))
    residue = values(5, 2, 6, torch.float32) / 10
    before, x_TE = residue.clone(), values(0, 2, 6)[1]
    payload = FeedbackCodec(codec, residue).encode(x_TE, source=1)
    assert torch.equal(payload, codec.encode(x_TE.float() + before[1], source=1))
    assert torch.equal(residue[1], x_TE.float() + before[1] - codec.decode(payload, source=1))
    assert torch.equal(residue[0], before[0])
    stands_in = FeedbackCodec(codec, residue).tokens(slice(2, 4)).features(32, 96)
    stands_in.encode(x_TE[2:4, 32:96], source=0)
    changed = (residue[0] != before[0]).nonzero()
    assert changed.min(0).values.tolist() == [2, 32] and changed.max(0).values.tolist() == [3, 95]


@pytest.mark.parametrize(
    "residue", [torch.zeros(6, 159), torch.zeros(6, 160).bfloat16(), torch.zeros(160, 6).T], ids=["E", "dtype", "rows"]
)
def test_a_residue_that_does_not_fit_is_refused(residue: Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"^residue: expected \[6, 160\] in fp32 on cpu, rows contiguous"):
        recipe("int4-group128").encode(values(0, 1, 6)[0], source=0, residue=residue)


def test_what_is_not_finite_leaves_nothing_behind() -> None:
    codec, _ = calibrated("int4-feature", values(99, 1, 200, torch.float32))
    residue, x_TE = torch.zeros(1, 3, NUM_FEATURES), values(0, 1, 3)[0]
    x_TE[1, 5], x_TE[2, 7] = torch.nan, torch.inf
    FeedbackCodec(codec, residue).encode(x_TE, source=0)
    assert residue.isfinite().all()
    assert residue[0, 0].abs().max() > 0 == residue[0, 1, 5] == residue[0, 2, 7]


# --- Real ranks -------------------------------------------------------------------------------------------------------


def on_rank(preset: str, algorithm: str, num_tokens: int, chunk_values: int | None) -> list[Tensor]:
    transport = TorchDistributedTransport()
    transport.chunk_values = chunk_values  # type: ignore[misc]
    rank, world_size = transport.rank, transport.world_size
    communicator = Communicator(sites(preset, world_size, algorithm), tp=transport, pp=None)
    given = [values(site, world_size, num_tokens)[rank] for site in range(NUM_SITES)]
    return [*forward(communicator, given), *forward(communicator, given)]


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40])
@pytest.mark.parametrize(
    ("world_size", "algorithm"), [(2, "one_shot"), (2, "two_shot"), (3, "two_shot"), (4, "auto"), (4, "hierarchical")]
)
@pytest.mark.parametrize("preset", ["int4-feature", "int4-group32-sym", "nvfp4"])
def test_real_ranks_equal_the_simulation(
    ranks: Pools, preset: str, world_size: int, algorithm: str, num_tokens: int
) -> None:
    """All at once and in chunks, tokens cut and features cut; a second forward begins anew."""
    expected = simulated(sites(preset, world_size, algorithm), world_size, num_tokens) * 2
    for chunk_values in (None, 1000):
        for found in ranks(world_size).run(on_rank, preset, algorithm, num_tokens, chunk_values):
            for mine, twins in zip(found, expected, strict=True):
                assert torch.equal(mine, twins)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_token_does_not_depend_on_the_others(algorithm: str) -> None:
    whole = simulated(sites("int4-feature", 3, algorithm), 3, 17)
    simulator = Simulator(sites("int4-feature", 3, algorithm), 3)
    own = slice(9, 14)
    part = forward(simulator, [values(site, 3, 17)[:, own] for site in range(NUM_SITES)])
    for mine, among_others in zip(part, whole, strict=True):
        assert torch.equal(mine, among_others[own])


# --- One forward long -------------------------------------------------------------------------------------------------


def test_nothing_leaks_from_one_forward_into_the_next() -> None:
    """After a whole one, after one that broke off, and after one that broke off and had as many tokens."""
    given = [values(site, 2, 5) for site in range(NUM_SITES)]
    expected = forward(Simulator(sites("int4-feature", 2, "two_shot"), 2), given)
    simulator = Simulator(sites("int4-feature", 2, "two_shot"), 2)
    garbage = [1000 * x for x in given]
    for broken_off in (NUM_SITES, 1, 3):
        for name, x in list(zip(SITES, garbage, strict=True))[:broken_off]:
            simulator.partial_sums(name)(x)
        for mine, fresh in zip(forward(simulator, given), expected, strict=True):
            assert torch.equal(mine, fresh)
    assert simulator.feedback._loss.residue is None, "nothing is kept after the last site"


@pytest.mark.parametrize("interrupted", ["another site in between was left out", "another number of tokens"])
def test_only_the_next_sum_of_the_same_tokens_takes_over(interrupted: str) -> None:
    simulator, later = Simulator(sites("int4-feature", 2, "one_shot"), 2), values(2, 2, 5)
    if interrupted.startswith("another site"):
        simulator.partial_sums(SITES[0])(values(0, 2, 5))
    else:
        for name in SITES[:2]:
            simulator.partial_sums(name)(values(0, 2, 6))
    alone = Simulator(sites("int4-feature", 2, "one_shot", chains=[]), 2).partial_sums(SITES[2])(later)
    assert torch.equal(simulator.partial_sums(SITES[2])(later), alone)


@pytest.mark.parametrize("form", ["native", "plain one_shot"])
def test_an_uncoded_sum_takes_everything_along(form: str) -> None:
    """The sum has all that was lost in it, and nothing is left to take along."""
    codecs, simulator = sites("int4-feature", 2, "two_shot"), Simulator(sites("int4-feature", 2, "two_shot"), 2)
    x, residue = values(0, 2, 12, torch.float32), values(7, 4, 12, torch.float32)
    expected = x.sum(0) + residue[:3].sum(0)
    choice = Choice.parse(form)
    codecs.decisions = Decisions(coded={NUM_FEATURES: ((1, choice),)})
    simulator.sites = codecs
    left = residue.clone()
    left[2:] = 0  # nothing of a sum that was coded again, where none is
    total = simulator.sum(list(x), SITES[1], left)
    torch.testing.assert_close(total, expected - residue[2])
    assert left.abs().max() < 1e-6


# --- Where it is sound ------------------------------------------------------------------------------------------------


def a_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = GraniteConfig(**SMALL, residual_multiplier=0.3) if name == "granite" else CONFIGS[name]()
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


IN_ORDER = [f"model.layers.{layer}.{site}" for layer in range(2) for site in ("self_attn.o_proj", "mlp.down_proj")]


@pytest.mark.parametrize("name", ["llama", "llama-biased", "mistral", "qwen2", "qwen3", "phi3", "granite"])
def test_sums_that_go_into_the_stream_as_they_are_form_a_chain(name: str) -> None:
    """A constant multiplier on the way is as good."""
    found = chains_of(a_model(name), Split(tp_size=2), random_ids(1, 8)[0])
    assert found.chains == (tuple(IN_ORDER),)
    assert not found.refused


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_sums_behind_norms_are_refused(name: str) -> None:
    found = chains_of(a_model(name), Split(tp_size=2), random_ids(1, 8)[0])
    assert found == Chains(refused=dict.fromkeys(IN_ORDER, BEHIND))


@pytest.mark.parametrize("experts", ["slices", "all_reduce"])
def test_experts_are_one_site(experts: str) -> None:
    found = chains_of(a_model("mixtral"), Split(tp_size=2, experts=experts), random_ids(1, 8)[0])  # type: ignore[arg-type]
    assert found.chains == (tuple(name.replace("mlp.down_proj", "mlp.experts") for name in IN_ORDER),)


def test_where_tokens_travel_to_experts_attention_is_a_chain() -> None:
    found = chains_of(a_model("mixtral"), Split(tp_size=2, experts="all_to_all"), random_ids(1, 8)[0])
    assert found.chains == (tuple(IN_ORDER[::2]),)


def test_a_stage_ends_a_chain() -> None:
    found = chains_of(a_model("llama"), Split(tp_size=2, pp_size=2), random_ids(1, 8)[0])
    assert found.chains == (tuple(IN_ORDER[:2]), tuple(IN_ORDER[2:]))


def test_one_sum_behind_a_gate_is_refused_alone() -> None:
    model = a_model("llama")
    layer = model.model.layers[1]  # type: ignore[union-attr, index]
    layer.mlp.register_forward_hook(lambda module, args, output: output * torch.sigmoid(5 * args[0][..., :1]))  # type: ignore[union-attr]
    found = chains_of(model, Split(tp_size=2), random_ids(1, 8)[0])
    assert found.chains == (tuple(IN_ORDER[:3]),)
    assert found.refused == {IN_ORDER[3]: BEHIND}


# --- Plans, attaching -------------------------------------------------------------------------------------------------


def test_a_plan_keeps_the_chains(tmp_path: Path) -> None:
    plan = narrowcast.calibrate(a_model("llama"), [random_ids(2, 16)], tp_size=2)
    assert plan.feedback.chains == (tuple(IN_ORDER),)
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").feedback == plan.feedback
    with pytest.raises(ValueError, match="in one chain once"):
        Chains.from_json({"chains": [["a", "b"], ["b", "c"]], "refused": {}, "readers": {}, "unread": ""})


def test_it_is_on_unless_it_is_turned_off() -> None:
    model, ids = a_model("llama"), random_ids(2, 16)
    plan = narrowcast.calibrate(model, [ids], tp_size=4, codec="int4-feature")
    logits = {}
    for feedback in (True, False):
        with torch.no_grad(), narrowcast.attach(model, plan, simulate=True, feedback=feedback):
            logits[feedback] = model(ids).logits.float()
    with torch.no_grad():
        exact = model(ids).logits.float()
    on, off = ((logits[each] - exact).norm() for each in (True, False))
    assert on < 0.8 * off


# --- Calibrating for it -----------------------------------------------------------------------------------------------


class Noted:
    """An observer that keeps what it sees of sums."""

    def __init__(self) -> None:
        self.partials: list[Tensor] = []
        self.totals: list[Tensor] = []

    def see_sum(self, partials: Sequence[Tensor], total: Tensor, site: str) -> None:
        self.partials.append(torch.stack([x.float() for x in partials]))
        self.totals.append(total)

    def see_columns(self, parts: Sequence[Tensor], site: str) -> None: ...

    def see(self, x: Tensor, site: str, *, ordered: bool = True) -> None: ...


def test_calibration_sees_what_is_coded() -> None:
    """Partial sums, and their sum, each with what was lost before; written anew with encode and decode alone."""
    partial, total = codecs_of("feature(bits=3)", 3, ())
    chained = SITES[:3]  # the fourth has a codec, and feeds nothing back
    plan = Plan(
        split=Split(tp_size=3),
        model=ModelFingerprint(config={}, samples={}),
        calibration={},
        sites={name: Site(kind="sum", codecs=(partial, total), error={}) for name in SITES},
        feedback=Chains(chains=(tuple(chained),)),
    )
    seen = Noted()
    wires = CodedWires([seen], plan)
    assert wires.feed_back
    lost, lost_of_sum = torch.zeros(3, 10, NUM_FEATURES), torch.zeros(10, NUM_FEATURES)
    for index, site in enumerate(SITES):
        x = values(index, 3, 10, torch.float32)
        found = wires.sum(list(x), site, wires.residue(site, 10, NUM_FEATURES, CPU))
        if site not in chained:
            assert torch.equal(found, seen.totals[-1])
            torch.testing.assert_close(found, x.sum(0))
            continue
        coded = x + lost
        torch.testing.assert_close(seen.partials[-1], coded)
        received = torch.stack(
            [
                partial.decode(partial.encode(y, source=rank), source=rank, dtype=torch.float32, num_features=160)
                for rank, y in enumerate(coded)
            ]
        )
        lost, summed = coded - received, received.sum(0) + lost_of_sum
        torch.testing.assert_close(seen.totals[-1], summed, atol=1e-4, rtol=1e-4)
        expected = total.decode(total.encode(summed, source=0), source=0, dtype=torch.float32, num_features=160)
        lost_of_sum = summed - expected
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_the_last_sum_of_a_stream_has_more_bits() -> None:
    """Of the model and of each stage; unless all have as many, another is asked for, or nothing is fed back."""
    model = a_model("llama")
    seen = observe(model, [random_ids(2, 16)], tp_size=2, pp_size=2)

    def of_last(codec: CodecByKind, **options: Any) -> list[str]:
        return [codec_name(seen.plan(codec, **options).sites[name].codecs[0]) for name in IN_ORDER]

    assert of_last("int4-feature") == ["feature", "int8-group128"] * 2
    assert of_last("int4-group128") == ["int4-group128", "int8-group128"] * 2
    assert of_last("int8-feature") == ["feature"] * 4
    assert of_last("bf16") == ["bf16"] * 4
    assert of_last({"sum": "int4-feature", "last": "fp8"}) == ["feature", "fp8"] * 2
    assert of_last("int4-feature", feedback=False) == ["feature"] * 4
    with pytest.raises(InvalidInputError, match="none for last, as fitted sums have bits by what each is worth"):
        seen.plan({"sum": "allocated", "last": "bf16"})


def test_a_plan_that_is_served_without_warns(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = a_model("llama"), random_ids(2, 16)
    plan = narrowcast.calibrate(model, [ids], tp_size=2, codec="int4-feature")
    narrowcast.attach(model, plan, simulate=True).remove()
    assert not caplog.records
    narrowcast.attach(model, plan, simulate=True, feedback=False).remove()
    (warning,) = caplog.messages
    kl = plan.calibration["kl_nats_without_feedback"]
    assert f"expect a KL divergence of {kl} nats, not {plan.calibration['kl_nats']}" in warning
    caplog.clear()
    without = narrowcast.calibrate(model, [ids], tp_size=2, codec="int4-feature", feedback=False)
    assert without.feedback == Chains(refused=dict.fromkeys(IN_ORDER, TURNED_OFF), unread=TURNED_OFF)
    assert without.calibration["kl_nats"] > plan.calibration["kl_nats"]
    narrowcast.attach(model, without, simulate=True, feedback=False).remove()
    assert not caplog.records


def find_chains(folder: Path) -> Chains:
    model = load_engine().load(folder, split=Split(tp_size=2, pp_size=2))
    return chains_of(model, Split(tp_size=2, pp_size=2), random_ids(1, 8)[0])


def test_stages_find_their_chains_however_large_their_sums_are(ranks: Pools, tmp_path: Path) -> None:
    """The second stage's are eight times as large: a disturbance has one size at all."""
    model = a_model("llama")
    with torch.no_grad():
        for name in IN_ORDER[2:]:
            model.get_submodule(name).weight *= 8  # type: ignore[operator]
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    expected = chains_of(model, Split(tp_size=2, pp_size=2), random_ids(1, 8)[0]).chains
    assert expected == (tuple(IN_ORDER[:2]), tuple(IN_ORDER[2:]))
    found = ranks(4).run(find_chains, tmp_path / "model")
    assert [each.chains for each in found] == [expected] * 4


def options_differ(folder: Path) -> str:
    rank = torch.distributed.get_rank()
    from narrowcast.engines import load_engine

    model = load_engine().load(folder / "model", split=Split(tp_size=2))
    with pytest.raises(InvalidInputError) as refusal:
        narrowcast.attach(model, Plan.load(folder / "plan"), feedback=rank == 0)
    return str(refusal.value)


def test_ranks_must_agree_on_it(ranks: Pools, tmp_path: Path) -> None:
    model = a_model("llama")
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    narrowcast.calibrate(model, [random_ids(2, 16)], tp_size=2).save(tmp_path / "plan")
    for message in ranks(2).run(options_differ, tmp_path):
        assert "Give every rank the same plan and options." in message
