"""`narrowcast estimate`: bytes as they are counted and times, from a model's config alone."""

import json
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from commands import refused, run
from conftest import MODEL
from models import SMALL, save_random
from narrowcast import PRESETS, attach, calibrate
from narrowcast.codecs import Ranges
from narrowcast.collectives import ALGORITHMS, Hops
from narrowcast.collectives.base import Algorithm, CodingWork
from narrowcast.engines import Matrix, Weights, load_engine
from narrowcast.engines.transformers.files.packed import PackedLayer
from narrowcast.errors import InvalidInputError
from narrowcast.launch.link import Link
from narrowcast.perf import compute, products
from narrowcast.perf.census import starred
from narrowcast.perf.compute import Machine, Products
from narrowcast.perf.cost import MESSAGE_S, Coding, CostModel
from narrowcast.perf.estimate import estimate
from narrowcast.perf.machines import MachinesEstimate, verdicts
from narrowcast.perf.replication import replication
from narrowcast.plan.decisions import Choice
from narrowcast.plan.split import Split
from narrowcast.weights.formats import Q4_0, w4a16

NO_CODING = Coding(encode_s=0.0, decode_s=0.0)
ONE, TWO, NATIVE = Choice("coded", "one_shot"), Choice("coded", "two_shot"), Choice("native")


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are measured of few weights."""
    monkeypatch.setattr(products, "BEYOND_CACHES", 1)
    monkeypatch.setattr(compute, "SIDE", 512)


def model_of(link: str, world_size: int, coding: Coding = NO_CODING, preset: str = "int4-feature") -> CostModel:
    recipe = PRESETS[preset]
    hops = Hops(tuple(recipe.codec(Ranges.of(torch.ones(sources, 1, 4096))) for sources in (world_size, 1)))
    return CostModel(
        hops=hops,
        num_features=4096,
        world_size=world_size,
        link=Link.parse(link),
        transport="tcp",
        coded=coding,
        plain=NO_CODING,
    )


def seconds(model: CostModel, choice: Choice, num_tokens: int) -> float:
    found = model.sum_s(choice, num_tokens)
    assert found is not None
    return found


def test_on_a_slow_link_payload_bytes_decide() -> None:
    """4.19 of 16 bits: two ranks swap payloads, whose bytes over the rate are the limit, and the time."""
    model = model_of("100Mbps,0ms", 2)
    nbytes = model.hops.codecs[0].payload_nbytes(512, 4096)
    limit_s = model.link.transfer_s(nbytes)
    assert limit_s < seconds(model, ONE, 512) < 1.06 * limit_s
    assert seconds(model, NATIVE, 512) / seconds(model, ONE, 512) == pytest.approx(16 / 4.1875, rel=0.03)


def test_delays_count_for_each_message() -> None:
    near, far = model_of("1Gbps,0ms", 4), model_of("1Gbps,10ms", 4)
    for choice, messages in ((ONE, 1), (TWO, 2), (NATIVE, 6)):
        assert seconds(far, choice, 1) - seconds(near, choice, 1) == pytest.approx(messages * 0.010)


def test_two_shot_sends_less_and_waits_more() -> None:
    model = model_of("1Gbps,1ms", 8)
    assert seconds(model, ONE, 1) < seconds(model, TWO, 1)
    assert seconds(model, ONE, 4096) > seconds(model, TWO, 4096)


def test_coding_hides_behind_the_link_or_the_link_behind_coding() -> None:
    free, slow = model_of("1Gbps,0ms", 2), model_of("1Gbps,0ms", 2, Coding(encode_s=1e-9, decode_s=1e-9))
    coding_s = 3 * 4096 * 4096 * 1e-9
    assert seconds(slow, ONE, 4096) < seconds(free, ONE, 4096) + coding_s / 8, "64 chunks hide it"
    assert seconds(slow, ONE, 1) == pytest.approx(seconds(free, ONE, 1) + 3 * 4096 * 1e-9), "one chunk hides nothing"


def test_break_even_is_where_the_times_cross() -> None:
    model = model_of("1Gbps,0ms", 2, Coding(encode_s=2e-7, decode_s=2e-7))
    assert model.break_even_nbytes(ONE) is None, "so slow a codec never pays"
    model = model_of("1Gbps,0ms", 2, Coding(encode_s=3e-9, decode_s=3e-9))
    nbytes = model.break_even_nbytes(ONE)
    assert nbytes is not None
    num_tokens = nbytes // 8192
    assert seconds(model, ONE, num_tokens) < seconds(model, NATIVE, num_tokens)


def toy_algorithm(work: CodingWork | None) -> Algorithm:
    """One that sends what one_shot sends, and says that it works that much."""
    return replace(ALGORITHMS["one_shot"], work=lambda num_values, world_size: work)


def test_an_algorithm_is_predicted_by_what_it_says_of_itself_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one, of any name: by its latencies and the values that it codes."""
    monkeypatch.setitem(ALGORITHMS, "silent", toy_algorithm(None))
    monkeypatch.setitem(ALGORITHMS, "three_shot", toy_algorithm(CodingWork(3, 1e6, 2e6)))
    model = model_of("1Gbps,1ms", 2, Coding(encode_s=1e-9, decode_s=2e-9))
    assert model.sum_s(Choice("coded", "silent"), 1) is None
    assert model.break_even_nbytes(Choice("coded", "silent")) is None
    free = model_of("1Gbps,1ms", 2)
    latency_s = 0.001 + MESSAGE_S["tcp"]
    more_s = 2 * latency_s + 1e6 * 1e-9 + 2e6 * 2e-9
    assert seconds(model, Choice("coded", "three_shot"), 1) == pytest.approx(seconds(free, ONE, 1) + more_s, rel=1e-2)
    report = estimate(MODEL, Split(tp_size=2), [], link=Link.parse("1Gbps,1ms"))
    times = {time.algorithm: time for time in report[0].times}
    assert times.keys() == {"native", *ALGORITHMS}
    assert times["silent"].prompt_ms is None and times["silent"].token_ms is None
    assert times["three_shot"].token_ms is not None


# What travels.


@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("llama-odd", Split(tp_size=3)),
        ("phi3", Split(tp_size=2)),  # fused projections are gathered
        ("olmo2", Split(tp_size=2)),  # norms over all heads
        ("llama", Split(tp_size=2, pp_size=2)),
        ("mixtral", Split(tp_size=2)),
        ("mixtral", Split(tp_size=2, experts="all_reduce")),
        ("qwen3-moe", Split(tp_size=2, experts="all_to_all")),
    ],
)
def test_bytes_are_those_that_are_counted_when_the_model_runs(family: str, split: Split, tmp_path: Path) -> None:
    """And but for tokens that travel to experts, no weight is needed for it."""
    folder, codec = save_random(family, tmp_path / "model"), "int8-group128"
    model = load_engine().load(folder)
    ids = torch.randint(101, (1, 10), generator=torch.Generator().manual_seed(0))
    plan = calibrate(model, [ids], tp_size=split.tp_size, pp_size=split.pp_size, experts=split.experts, codec=codec)
    with attach(model, plan, simulate=True) as handle, torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    counted: dict[str, int] = defaultdict(int)
    for name, site in handle.report().sites.items():
        counted[starred(name)] += site.wire_bytes
    if split.experts != "all_to_all":
        (folder / "model.safetensors").unlink()
    (_, found) = estimate(folder, split, [codec], input_len=10)
    assert {site.site: site.prompt_bytes for site in found.sites} == counted


# One machine beside several.

MACHINE = Machine(read_bps=1e9, macs_per_s=1e12, memory_nbytes=10**9, origin="as given")


@pytest.mark.parametrize("weights", ["stored", "int4-group32"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-odd", "phi3", "gemma2"])
def test_matrices_are_those_that_a_model_holds(family: str, weights: Weights, tmp_path: Path) -> None:
    """Before it is loaded, and the weights need not be there: all but its vectors."""
    folder = save_random(family, tmp_path / "model")
    model = load_engine().load(folder, weights=weights)
    (folder / "model.safetensors").unlink()
    kept = {id(each.matrix): each.matrix.nbytes for each in model.modules() if isinstance(each, PackedLayer)}
    values = sum(each.nbytes for each in model.parameters() if each.ndim > 1)
    matrices = load_engine().matrices(folder, weights=weights)
    assert sum(each.nbytes for each in matrices) == values + sum(kept.values())
    assert sum(each.of_last for each in matrices) == 1


@pytest.mark.parametrize("weights", ["stored", "dense"])
def test_a_file_in_few_bits_is_counted_as_it_is_kept(weights: Weights, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    from gguf_files import Kind, write_gguf

    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", Kind.Q8_0)
    model = load_engine().load(path, weights=weights)
    kept = {id(each.matrix): each.matrix.nbytes for each in model.modules() if isinstance(each, PackedLayer)}
    values = sum(each.nbytes for each in model.parameters() if each.ndim > 1)
    assert bool(kept) == (weights == "stored")
    matrices = load_engine().matrices(path, weights=weights)
    assert sum(each.nbytes for each in matrices) == values + sum(kept.values())


def test_a_config_alone_says_that_layers_are_in_few_bits(tmp_path: Path) -> None:
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    LlamaConfig(**SMALL | {"hidden_size": 128, "intermediate_size": 256}, **quantized).save_pretrained(tmp_path)
    embedding, *layers, output = load_engine().matrices(tmp_path)
    assert {each.format for each in (embedding, output)} == {torch.bfloat16}
    assert {each.format for each in layers} == {w4a16(128)} and len(layers) == 14
    sparse = SMALL | {"hidden_size": 128, "intermediate_size": 256}
    MixtralConfig(**sparse, num_local_experts=4, **quantized).save_pretrained(tmp_path / "sparse")
    assert {each.format for each in load_engine().matrices(tmp_path / "sparse") if each.number == 4} == {w4a16(128)}
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf8"))
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf8")
    with pytest.raises(InvalidInputError, match="found quantization fp8"):
        load_engine().matrices(tmp_path)


def test_experts_are_used_by_few_tokens_and_held_all(tmp_path: Path) -> None:
    matrices = load_engine().matrices(save_random("mixtral", tmp_path / "model"))
    experts = [each for each in matrices if each.number > 1]
    assert len(experts) == 4 and {(each.number, each.used) for each in experts} == {(4, 2)}
    given = replace(experts[0], shape=(1000, 1000))
    for experts_are, used in (("slices", 2 / 4), ("all_reduce", 1)):
        found = Products.of([given], MACHINE, Split(tp_size=4, experts=experts_are), 512)
        assert found.token_s == pytest.approx(used * 2e6 / 1e9), "of whole experts a rank has one or none to read"
        assert found.held_nbytes == 4 * 2e6 / 4
        assert found.prompt_s == pytest.approx(4 * 2e6 / 4 / 1e9), "512 tokens read all of them"
    packed = load_engine().matrices(tmp_path / "model", weights="int4-group32")
    assert [(each.number, each.shape) for each in packed] == [(each.number, each.shape) for each in matrices]
    assert {each.format for each in packed if each.number > 1} == {Q4_0}


def test_ranks_share_products_and_stages_memory() -> None:
    shared = Matrix(shape=(1000, 1000), format=torch.bfloat16, is_shared=True)
    whole, looked_up = replace(shared, is_shared=False), replace(shared, used=0)
    alone = Products.of([shared, whole, looked_up], MACHINE, Split(), 10**6)
    assert alone == Products(prompt_s=2.0, token_s=4e-3, held_nbytes=6 * 10**6)
    ranks = Products.of([shared, whole, looked_up], MACHINE, Split(tp_size=2), 10**6)
    assert ranks == Products(prompt_s=1.5, token_s=3e-3, held_nbytes=4 * 10**6)
    assert Products.of([shared], MACHINE, Split(pp_size=2), 10**6) == Products(
        prompt_s=1.0, token_s=2e-3, held_nbytes=10**6
    )
    logits = Products.of([replace(shared, of_last=True)], MACHINE, Split(), 10**6)
    assert logits.prompt_s == pytest.approx(2e-3), "the last token alone reads it"


def machines(one_ms: float, two_ms: float, held: int = 10**6) -> list[MachinesEstimate]:
    """A prompt as long as its token; natively several machines take longer."""
    one = MachinesEstimate(
        machines=1,
        codec="",
        weights_bytes=held,
        prompt_products_ms=one_ms,
        token_products_ms=one_ms,
        prompt_ms=one_ms,
        token_ms=one_ms,
    )
    two = replace(one, machines=2, weights_bytes=held // 2, codec="int4-feature", prompt_ms=two_ms, token_ms=two_ms)
    return [one, replace(two, codec="bf16", prompt_ms=9 * two_ms, token_ms=None), two]


def test_more_machines_are_not_slower_without_a_word() -> None:
    slow, even, fast = (list(verdicts(machines(10, two_ms), MACHINE)) for two_ms in (20.0, 9.0, 6.0))
    assert slow == [
        "Than one machine, 2 machines are slower for a prompt (20 ms, not 10) and slower for a token after it "
        "(20 ms, not 10)."
    ]
    assert [sentence.count("hardly faster") for sentence in even] == [2]
    assert not fast


def test_weights_that_do_not_fit_are_told() -> None:
    (told,) = verdicts(machines(10, 5, held=1_500_000_000), MACHINE)
    assert told == "The weights do not fit into one machine: 1.5 GB in each, for 1 GB of memory, as given."
    assert len(list(verdicts(machines(10, 5, held=3_000_000_000), MACHINE))) == 2, "nor into two"
    assert not list(verdicts(machines(10, 5, held=10**12), replace(MACHINE, memory_nbytes=0))), "nothing tells"


def test_a_machine_is_measured_by_its_products() -> None:
    for form in (torch.bfloat16, Q4_0, w4a16(128)):
        found = Machine.measured(form)
        assert found.read_bps > 0 and found.macs_per_s > 0 and found.origin.startswith("measured here, ")


def test_a_machine_is_given_as_text() -> None:
    given = Machine.parse("50GBps,2TFLOPS,32GB")
    assert given == Machine(read_bps=5e10, macs_per_s=1e12, memory_nbytes=32 * 10**9, origin="as given")
    assert Machine.parse("50GB/s, 2000GFLOPS, 0.032TB") == given


def test_the_command_shows_one_machine_beside_several(tmp_path: Path) -> None:
    """By given figures; a small model on a slow link is told to stay on one, in few bits all the more."""
    asked = "--link", "100Mbps,1ms", "--codec", "int4-feature", "--machine", "10GBps,1TFLOPS,8GB"
    report = estimated(MODEL, tmp_path / "r.json", *asked)
    one, *several = report["machines"]
    assert (one["machines"], one["codec"]) == (1, "") and one["prompt_ms"] == one["prompt_products_ms"]
    assert [(row["machines"], row["codec"]) for row in several] == [(2, "bf16"), (2, "int4-feature")]
    for row in several:
        sums = next(each["times"] for each in report["codecs"] if each["codec"] == row["codec"])
        for figure in ("prompt", "token"):
            least = min(each[f"{figure}_ms"] for each in sums)
            assert row[f"{figure}_ms"] == pytest.approx(row[f"{figure}_products_ms"] + least)
            assert row[f"{figure}_products_ms"] == pytest.approx(one[f"{figure}_products_ms"] / 2)
    shown = " ".join(run("estimate", MODEL, *asked, "--weights", "int4-group32", "--json", tmp_path / "r.json").split())
    assert "Than one machine, 2 machines are slower" in shown and "as given" in shown
    few = json.loads((tmp_path / "r.json").read_text(encoding="utf8"))["machines"][0]
    assert few["token_ms"] < one["token_ms"] / 1.8 and few["prompt_ms"] <= one["prompt_ms"]
    assert "measured here" in run("estimate", MODEL, *asked[:4])


def estimated(folder: Path, report: Path, *options: str) -> dict[str, Any]:
    shown = run("estimate", folder, "--json", report, *options)
    assert "a prompt of" in shown and ("pays from" in shown) == ("--link" in options)
    values: dict[str, Any] = json.loads(report.read_text(encoding="utf8"))
    return values


def test_the_command_shows_what_would_travel_before_there_is_a_plan(tmp_path: Path) -> None:
    """Per token of two ranks: 134 of 512 bytes at each sum; an embedding row and half of the logits as they are."""
    asked = "-tp", "2", "--input-len", "10", "--codec", "int4-feature"
    plain, coded = estimated(MODEL, tmp_path / "r.json", *asked)["codecs"]
    assert (plain["codec"], coded["codec"], coded["bits_per_value"]) == ("bf16", "int4-feature", 4.1875)
    for codec, nbytes in ((plain, 512), (coded, 134)):
        rows = {row.pop("site"): row for row in codec["sites"]}
        each = {"kind": "sum", "number": 8, "prompt_bytes": 80 * nbytes, "token_bytes": 8 * nbytes}
        assert rows["model.layers.*.mlp.down_proj"] == rows["model.layers.*.self_attn.o_proj"] == each
        assert (rows["model.embed_tokens"]["prompt_bytes"], rows["lm_head"]["prompt_bytes"]) == (10 * 512, 4096)
    assert "1.90 times fewer" in run("estimate", MODEL, *asked)


def test_the_command_reads_nothing_but_the_config(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(MODEL / "config.json", folder)
    asked = "-tp", "4", "--link", "1Gbps,0.1ms", "--codec", "int4-feature"
    report = estimated(folder, tmp_path / "r.json", *asked)
    plain, coded = ({row["algorithm"]: row for row in codec["times"]} for codec in report["codecs"])
    assert list(plain) == ["native", "one_shot", "two_shot"] and list(coded) == ["one_shot", "two_shot"]
    assert coded["two_shot"]["prompt_ms"] < plain["two_shot"]["prompt_ms"] < plain["native"]["prompt_ms"]
    longer = estimated(folder, tmp_path / "r.json", *asked, "--input-len", "512")["codecs"][0]["times"][0]
    shorter = estimated(folder, tmp_path / "r.json", *asked, "--input-len", "64")["codecs"][0]["times"][0]
    assert longer["prompt_ms"] > shorter["prompt_ms"] and longer["token_ms"] == shorter["token_ms"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-tp", "2", "--link", "fast"), "expected RATE,DELAY"),
        (("-tp", "1"), "above 1, found one rank"),
        (("-tp", "2", "--link", "1Gbps,0ms", "--machine", "fast"), "expected RATE,SPEED,MEMORY"),
        (("-tp", "2", "--machine", "10GBps,1TFLOPS,8GB"), "--machine: expected --link beside it"),
        (("-tp", "2", "--weights", "int4-group32"), "--weights: expected --link beside it"),
        (("-tp", "2", "--transport", "pigeon"), "one of auto, tcp, torch"),
        (("-tp", "2", "--codec", "int9"), "int9"),
        (("-tp", "2", "--input-len", "513"), "512 tokens at most, the model's context, found 513"),
    ],
)
def test_wrong_options_are_told(options: tuple[str, ...], message: str) -> None:
    assert message in refused("estimate", MODEL, *options)


def test_what_is_kept_whole_has_the_bits_of_its_weights() -> None:
    def bytes_of(weights: Weights) -> dict[str, int]:
        found = replication(MODEL, Split(tp_size=2), weights=weights)
        return {each.matrix: max(each.held_bytes, each.read_bytes) for each in found}

    dense, packed = bytes_of("dense"), bytes_of("int8-group32")

    assert dense and dense.keys() == packed.keys()
    assert all(packed[matrix] == dense[matrix] * 34 // 64 for matrix in dense), "the bundled model's is tied, in 8 bits"
