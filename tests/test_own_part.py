"""A rank's own part exact: its blocks read the shared stream and what its own last payload lost, and nothing parts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

import narrowcast
from models import CONFIGS, SMALL, random_ids, save_random
from narrowcast.calibration.stream import chains_of
from narrowcast.codecs import recipe
from narrowcast.engines import Replicated, load_engine
from narrowcast.plan import Plan
from narrowcast.plan.chains import Chains, Reader
from narrowcast.plan.split import Split
from narrowcast.plan.summary import LASTS, feedback_in_words
from narrowcast.runtime.feedback import Feedback
from ranks import Ranks

Pools = Callable[[int], Ranks]
EXTRA = {
    "granite": lambda: GraniteConfig(**SMALL, residual_multiplier=0.3),
    "cohere": lambda: CohereConfig(**SMALL),  # attention and MLP side by side, of one norm
}
NORMS = [f"model.layers.{name}" for name in ("0.post_attention", "1.input", "1.post_attention")]
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
SPLIT = Split(tp_size=2)


def a_model(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config({**CONFIGS, **EXTRA}[name]()).to(dtype).eval()


def found(name: str, split: Split = SPLIT) -> dict[str, tuple[float, tuple[str, ...]]]:
    """Scale and last names of the modules, by reader."""
    readers = chains_of(a_model(name), split, random_ids(1, 8)[0]).readers
    return {
        norm.removesuffix("_layernorm"): (each.scale, tuple(module.rpartition(".")[2] for module in each.modules))
        for norm, each in readers.items()
    }


# --- Who reads the stream ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-biased", "mistral", "qwen2", "qwen3"])
def test_norms_between_two_sums_read_it_for_what_each_rank_computes(name: str) -> None:
    """Not the first one, before which nothing is lost, nor the last, whose output all ranks decide by."""
    assert found(name) == dict(zip(NORMS, [(1.0, MLP), (1.0, ATTENTION), (1.0, MLP)], strict=True))


def test_other_ways_to_write_a_block() -> None:
    assert found("granite") == {norm: (0.3, modules) for norm, (_, modules) in found("llama").items()}
    assert found("phi3")[NORMS[1]] == (1.0, ("qkv_proj",))
    assert found("cohere") == {NORMS[1]: (1.0, (*ATTENTION, *MLP))}


@pytest.mark.parametrize(("experts", "last"), [("slices", "experts"), ("all_reduce", "experts"), ("all_to_all", None)])
def test_experts_read_it_and_routers_do_not(experts: Any, last: str | None) -> None:
    """Nor experts that tokens travel to: whose token it is says where it stands in the batch."""
    readers = found("mixtral", Split(tp_size=2, experts=experts))
    assert [modules for _, modules in readers.values()] == ([(last,), ATTENTION, (last,)] if last else [ATTENTION])


def test_readers_know_what_they_follow() -> None:
    chains = chains_of(a_model("llama"), SPLIT, random_ids(1, 8)[0])
    assert [each.after for each in chains.readers.values()] == list(chains.chains[0][:-1])
    side_by_side = chains_of(a_model("cohere"), SPLIT, random_ids(1, 8)[0])
    assert [each.after for each in side_by_side.readers.values()] == ["model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_where_nothing_is_fed_back_nobody_reads_it(name: str) -> None:
    assert chains_of(a_model(name), SPLIT, random_ids(1, 8)[0]).readers == {}


def test_whoever_reads_something_else_than_the_stream_as_it_has_grown_is_left_out() -> None:
    """As does the MLP's norm of GPT-NeoX, called after the attention's sum, with the stream before it."""
    model = a_model("llama")
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: (inputs[0].abs(),))
    readers = chains_of(model, SPLIT, random_ids(1, 8)[0]).readers
    assert set(readers) == {f"{NORMS[1]}_layernorm"}


def test_ranks_without_whole_heads_do_without_and_say_so() -> None:
    model = a_model("llama")
    chains = chains_of(model, Split(tp_size=3), random_ids(1, 8)[0])
    assert chains.readers and not chains.read
    assert "expected ranks that each have as many whole heads, found 4 heads, 4 KV heads" in chains.unread
    plan = narrowcast.calibrate(model, [random_ids(2, 16)], tp_size=3, codec="int4-feature")
    assert list(feedback_in_words(plan))[-1] == f"own part exact at 0 of 4 sums: {chains.unread}"
    plan = narrowcast.calibrate(model, [random_ids(2, 16)], tp_size=2, codec="int4-feature")
    assert list(feedback_in_words(plan))[-1] == f"own part exact at 3 of 4 sums: {LASTS}"


def test_a_plan_keeps_the_readers(tmp_path: Path) -> None:
    plan = narrowcast.calibrate(a_model("granite"), [random_ids(2, 16)], tp_size=2, codec="int4-feature")
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").feedback == plan.feedback
    assert len(plan.feedback.readers) == 3
    twice = {norm: {"after": "s", "modules": ["m"], "scale": 1} for norm in "ab"}
    for readers in (twice, {"a": {"after": "s", "modules": ["m"], "scale": float("nan")}}):
        with pytest.raises(ValueError, match="a module has one reader, of a finite scale"):
            Chains.from_json({"chains": [], "refused": {}, "readers": readers, "unread": ""})
    without = narrowcast.calibrate(a_model("llama"), [random_ids(2, 16)], tp_size=2, codec="int4", feedback=False)
    assert without.feedback.readers == {}


# --- What is computed -------------------------------------------------------------------------------------------------


def written_anew(model: Any, ids: Tensor, codecs: Any, num_ranks: int, *, two_shot: bool, own: bool) -> Tensor:
    """Logits of a Llama over several ranks with all losses fed back, of encode and decode alone."""
    config = model.config
    num_heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    stream = model.model.embed_tokens(ids)
    cos, sin = (x[:, None] for x in model.model.rotary_emb(stream, torch.arange(ids.shape[1])[None]))
    lost, lost_of_sum = [torch.zeros_like(stream)] * num_ranks, torch.zeros_like(stream)

    def coded(x: Tensor, hop: int) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        payload = codecs[hop].encode(flat, source=0)
        return codecs[hop].decode(payload, source=0, dtype=torch.float32, num_features=x.shape[-1]).view(x.shape)

    def added(partials: list[Tensor], *, exact: bool) -> None:
        nonlocal stream, lost, lost_of_sum
        given = [x + e for x, e in zip(partials, lost, strict=True)]
        sent = given if exact else [coded(x, 0) for x in given]
        lost, total = [x - d for x, d in zip(given, sent, strict=True)], sum(sent) + lost_of_sum
        arrived = coded(total, 1) if two_shot and not exact else total
        lost_of_sum, stream = total - arrived, stream + arrived

    def read(norm: nn.Module, rank: int) -> Tensor:
        read_from: Tensor = norm(stream + lost[rank] if own else stream)
        return read_from

    def rows(weight: Tensor, rank: int) -> Tensor:
        return weight.chunk(num_ranks)[rank]

    def turned(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    for place, layer in enumerate(model.model.layers):
        attention, mlp, partials = layer.self_attn, layer.mlp, []
        for rank in range(num_ranks):
            x = read(layer.input_layernorm, rank)
            q, k, v = (
                functional.linear(x, rows(projection.weight, rank)).unflatten(-1, (-1, width)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            y = functional.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
            columns = attention.o_proj.weight.chunk(num_ranks, dim=1)[rank]
            partials.append(functional.linear(y.transpose(1, 2).flatten(2), columns))
        assert num_heads % num_ranks == 0
        added(partials, exact=False)
        partials = []
        for rank in range(num_ranks):
            x = read(layer.post_attention_layernorm, rank)
            gate, up = (functional.linear(x, rows(each.weight, rank)) for each in (mlp.gate_proj, mlp.up_proj))
            columns = mlp.down_proj.weight.chunk(num_ranks, dim=1)[rank]
            partials.append(functional.linear(functional.silu(gate) * up, columns))
        added(partials, exact=place == len(model.model.layers) - 1)
    logits: Tensor = model.lm_head(model.model.norm(stream))
    return logits


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_it_is_what_the_same_model_written_anew_computes(num_ranks: int, algorithm: str) -> None:
    """In FP32, where sums that round otherwise may code a value one level off."""
    model, ids, codec = a_model("llama", torch.float32), random_ids(2, 9), recipe("group(bits=6, size=32)")
    kinds = {"sum": "group(bits=6, size=32)", "last": "cast(dtype=fp32)"}
    plan = narrowcast.calibrate(model, [random_ids(2, 16)], tp_size=num_ranks, codec=kinds)
    assert len(plan.feedback.readers) == 3
    expected, shared = (
        written_anew(model, ids, [codec] * 2, num_ranks, two_shot=algorithm == "two_shot", own=own)
        for own in (True, False)
    )
    with narrowcast.attach(model, plan, simulate=True, algorithm=algorithm):
        logits = model(ids, use_cache=False).logits
    assert (logits - expected).norm() < 0.1 * (shared - expected).norm()


def test_a_view_is_of_its_token_alone_and_nothing_outlives_its_chain() -> None:
    chains = Chains(chains=(("a", "b"),), readers={"norm": Reader(after="a", modules=("m",), scale=0.5)})
    feedback, stream, ranks = Feedback(chains, (2, 1)), torch.randn(3, 4, 8), range(2)
    assert feedback.read("norm", stream, torch.neg, ranks).equal(-stream)
    assert all(x is stream for x in feedback.inputs("m", stream, ranks)), "nothing is lost yet"
    residue = feedback.residue("a", 12, 8, stream.device)
    assert residue is not None
    residue.normal_()
    shared = feedback.read("norm", stream, torch.neg, ranks)
    assert shared.equal(-stream)
    views = feedback.inputs("m", shared.flatten(0, 1), ranks)
    for rank in ranks:
        assert views[rank].equal(-(stream.flatten(0, 1) + 0.5 * residue[rank]))
    assert feedback.inputs("another", shared, ranks)[0] is shared
    feedback.read("norm", stream[:1], torch.neg, ranks)
    assert feedback.inputs("m", stream[:1], ranks)[0].equal(stream[:1]), "other tokens"
    feedback.read("norm", stream, torch.neg, ranks)
    feedback.residue("b", 12, 8, stream.device)
    assert feedback.inputs("m", shared, ranks)[0] is shared, "the last sum drops all"


def test_without_feedback_and_counting_alone_nobody_reads() -> None:
    model, ids = a_model("llama"), random_ids(2, 16)
    plan = narrowcast.calibrate(model, [ids], tp_size=2, codec="int4-feature")
    with torch.no_grad():
        plain = model(ids).logits
        with narrowcast.attach(model, plan, simulate=True, count_only=True):
            counted = model(ids).logits
    assert (counted - plain).abs().max() < 0.05 * plain.abs().max()
    reads = "post_attention_layernorm"
    for options, replaced in (({}, True), ({"feedback": False}, False), ({"count_only": True}, False)):
        with narrowcast.attach(model, plan, simulate=True, **options):  # type: ignore[arg-type]
            assert ("forward" in vars(getattr(model.model.layers[0], reads))) == replaced
    assert "forward" not in vars(getattr(model.model.layers[0], reads))


@pytest.mark.parametrize("tp_size", [2, 4])
def test_expected_errors_are_those_of_the_others(tp_size: int) -> None:
    """R - 1 errors of R where payloads err alike and independently; all of them at the last sum."""
    model = a_model("llama", torch.float32)
    plan = narrowcast.calibrate(model, [random_ids(4, 32)], tp_size=tp_size, codec={"sum": "int4", "last": "int4"})
    first, last = plan.feedback.chains[0][0], plan.feedback.chains[0][-1]
    seen = narrowcast.calibrate(
        model, [random_ids(4, 32)], tp_size=tp_size, codec={"sum": "int4", "last": "int4"}, feedback=False
    )
    assert first in plan.feedback.read and last not in plan.feedback.read
    ratio = plan.sites[first].error["one_shot"] / seen.sites[first].error["one_shot"]
    assert ratio == pytest.approx((1 - 1 / tp_size) ** 0.5, rel=0.06)


# --- Real ranks never part --------------------------------------------------------------------------------------------


def planted(folder: Path, name: str) -> Path:
    """A model whose best tokens, and best experts, are near ties: rows that differ by what rounds away in BF16."""
    save_random(name, folder, dtype=torch.float32)
    model = load_engine().load(folder)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key == "lm_head.weight" or key.endswith("gate.weight"):
                weight[1::2] = weight[: len(weight) // 2 * 2 : 2][: len(weight[1::2])]
                weight += 1e-5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def observed(model: Any, plan: Plan, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, a greedy text, and the experts that routers chose for the logits."""
    chosen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1].clone()))
        for name, module in model.named_modules()
        if name.endswith("experts")
    ]
    with torch.no_grad(), narrowcast.attach(model, plan, **options):
        logits = model(ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        return logits, model.generate(ids, max_new_tokens=12, do_sample=False), chosen


def on_rank(folder: Path, ids: Tensor, replicated: Replicated) -> tuple[Tensor, Tensor, list[Tensor]]:
    model = load_engine().load(folder, split=SPLIT, replicated=replicated)
    return observed(model, Plan.load(folder / "plan"), ids)


@pytest.mark.parametrize(("name", "replicated"), [("llama", "none"), ("llama", "all"), ("mixtral", "none")])
def test_near_ties_are_decided_alike_on_all_ranks(
    ranks: Pools, tmp_path: Path, name: str, replicated: Replicated
) -> None:
    folder, ids = planted(tmp_path / "model", name), random_ids(3, 12)
    model = load_engine().load(folder)
    plan = narrowcast.calibrate(model, [random_ids(4, 32)], tp_size=2, codec="int4-group32-sym")
    assert len(plan.feedback.readers) == 3
    plan.save(folder / "plan")
    expected = observed(model, plan, ids, simulate=True)
    best = expected[0].topk(2).values
    assert (best[..., 0] - best[..., 1]).median() < 1e-3 * best.abs().max(), "most ties are near"
    for logits, text, chosen in ranks(2).run(on_rank, folder, ids, replicated):
        assert torch.equal(logits, expected[0])
        assert torch.equal(text, expected[1])
        assert all(torch.equal(*pair) for pair in zip(chosen, expected[2], strict=True))


@torch.no_grad()
def test_if_routers_read_what_ranks_know_they_would_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail: by its own view, each rank would choose experts of its own."""
    model = load_engine().load(planted(tmp_path, "mixtral"))
    plan = narrowcast.calibrate(model, [random_ids(4, 32)], tp_size=2, codec="int4-group32-sym")
    seen: dict[str, Sequence[Tensor]] = {}
    inputs = Feedback.inputs

    def recorded(self: Feedback, module: str, x: Tensor, ranks: Sequence[int]) -> Sequence[Tensor]:
        seen[module] = inputs(self, module, x, ranks)
        return seen[module]

    monkeypatch.setattr(Feedback, "inputs", recorded)
    with narrowcast.attach(model, plan, simulate=True):
        model(random_ids(3, 12))
    router = model.get_submodule("model.layers.1.mlp.gate")
    weight = cast(Tensor, router.weight)
    first, second = (functional.linear(x, weight).topk(2).indices for x in seen["model.layers.1.mlp.experts"])
    assert not torch.equal(first, second)
