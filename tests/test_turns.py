"""Long prompts in halves: in turns on real ranks, one after the other in the simulation, and the same bits."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

import narrowcast
from models import MORE, random_ids, save_random
from narrowcast import InvalidInputError, Plan
from narrowcast.collectives.base import Exchange
from narrowcast.collectives.pending import Pending
from narrowcast.engines import load_engine
from narrowcast.evaluation import evaluate
from narrowcast.evaluation import ranks as on_ranks
from narrowcast.evaluation.ranks import Job, Outcome
from narrowcast.plan.decisions import Choice, Decisions
from narrowcast.plan.split import Split
from narrowcast.transport.base import Collectives
from ranks import Ranks

Pools = Callable[[int], Ranks]
transformers = load_engine()

LENGTH = 45  # halves of 22 and 23
FAMILIES = "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "olmo2", "mixtral", "qwen3-moe", *MORE


def planned(folder: Path, tp_size: int, codec: str = "int4-feature") -> Plan:
    plan = narrowcast.calibrate(transformers.load(folder), [random_ids(2, 40, seed=1)], tp_size=tp_size, codec=codec)
    plan.save(folder / "plan", overwrite=True)
    return plan


def padded(batch: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, :9] = 0
    return {"input_ids": random_ids(batch, length), "attention_mask": mask}


def answers(model: Any, plan: Plan, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Any]:
    with torch.no_grad(), narrowcast.attach(model, plan, prompt_chunks=2, **options) as handle:
        logits = model(**inputs).logits
        text = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        return logits, text, handle.report()


def on_rank(folder: Path, inputs: dict[str, Tensor], algorithm: str) -> tuple[Tensor, Tensor, Any]:
    model = transformers.load(folder, split=Split(tp_size=dist.get_world_size()))
    return answers(model, Plan.load(folder / "plan"), inputs, algorithm=algorithm)


@pytest.mark.parametrize(("algorithm", "tp_size"), [("one_shot", 2), ("two_shot", 4)])
@pytest.mark.parametrize("name", FAMILIES)
def test_in_turns_as_one_half_after_the_other(
    ranks: Pools, tmp_path: Path, name: str, algorithm: str, tp_size: int
) -> None:
    folder, inputs = save_random(name, tmp_path / "model"), padded()
    plan = planned(folder, tp_size)
    logits, text, report = answers(transformers.load(folder), plan, inputs, algorithm=algorithm, simulate=True)
    assert report.prompts == {"in halves": 2}
    all_found = ranks(tp_size).run(on_rank, folder, inputs, algorithm)
    for found in all_found:
        assert torch.equal(found[0], logits)
        assert torch.equal(found[1], text)
        assert found[2].prompts == {"in halves": 2}
    assert all_found[0][2].bits_per_value == report.bits_per_value


@pytest.mark.parametrize("name", FAMILIES)
def test_the_halves_are_the_chunks_of_the_engine(tmp_path: Path, name: str) -> None:
    """Transformers cuts prompts by itself, one chunk after the other."""
    folder, inputs = save_random(name, tmp_path / "model"), padded(length=44)
    plan, model = planned(folder, 2), transformers.load(folder)
    asked = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with narrowcast.attach(model, plan, simulate=True):
        expected = model.generate(**inputs, **asked, prefill_chunk_size=22)
    with narrowcast.attach(model, plan, simulate=True, prompt_chunks=2):
        found = model.generate(**inputs, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(*pair) for pair in zip(found.logits, expected.logits, strict=True))


OTHER_KINDS: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"do_sample": True, "num_return_sequences": 2},
    {"prompt_lookup_num_tokens": 3},  # assisted: several tokens at a time, after a prompt
]


@pytest.mark.parametrize("options", OTHER_KINDS)
def test_other_kinds_of_generation(tmp_path: Path, options: dict[str, Any]) -> None:
    folder, ids = save_random("mistral", tmp_path / "model"), random_ids(1, 44)
    plan, model, texts = planned(folder, 2), transformers.load(folder), []
    for prompt_chunks, more in (1, {"prefill_chunk_size": 22}), (2, {}):
        torch.manual_seed(0)
        with narrowcast.attach(model, plan, simulate=True, prompt_chunks=prompt_chunks) as handle:  # type: ignore[arg-type]
            texts.append(model.generate(ids, max_new_tokens=5, **options, **more))
    assert torch.equal(*texts)
    assert handle.report().prompts == {"in halves": 1}


def test_continuous_batches_are_cut_by_their_scheduler(tmp_path: Path) -> None:
    folder = save_random("mistral", tmp_path / "model")
    plan, model = planned(folder, 2), transformers.load(folder)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (60, 50, 9)]
    asked = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config, found = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=128), []
    for prompt_chunks in (1, 2):
        with torch.no_grad(), narrowcast.attach(model, plan, simulate=True, prompt_chunks=prompt_chunks) as handle:  # type: ignore[arg-type]
            done = model.generate_batch(
                inputs=prompts, generation_config=asked, continuous_batching_config=config, progress_bar=False
            )
        found.append([done[key].generated_tokens for key in sorted(done)])
    assert found[0] == found[1]
    assert handle.report().prompts == {"one forward: cache, cu_seq_lens_k, ... given": 1}


def with_static_cache(folder: Path, inputs: dict[str, Tensor], prompt_chunks: Any, simulate: bool = False) -> Any:
    plan = Plan.load(folder / "plan")
    model: Any = transformers.load(folder, split=Split() if simulate else plan.split)
    length, asked = inputs["input_ids"].shape[1], {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    with torch.no_grad(), narrowcast.attach(model, plan, prompt_chunks=prompt_chunks, simulate=simulate) as handle:
        text = model.generate(**inputs, **asked, cache_implementation="static")
        chunked = model.generate(**inputs, **asked, cache_implementation="static", prefill_chunk_size=length // 2)
        return text, chunked, handle.report().prompts


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "mistral"])
def test_static_caches(ranks: Pools, tmp_path: Path, name: str) -> None:
    """Masks are made for the whole prompt there, and cut by what each layer holds."""
    folder, inputs = save_random(name, tmp_path / "model"), padded(length=44)
    planned(folder, 2)
    _, expected, _ = with_static_cache(folder, inputs, 1, simulate=True)
    for text, _, prompts in ranks(2).run(with_static_cache, folder, inputs, 2):
        assert torch.equal(text, expected)
        assert prompts == {"in halves": 1}  # the engine's own chunks are short


def kept(folder: Path, ids: Tensor, num_kept: int, use_cache: bool, simulate: bool = False) -> tuple[Tensor, bool]:
    plan = Plan.load(folder / "plan")
    model: Any = transformers.load(folder, split=Split() if simulate else plan.split)
    with torch.no_grad(), narrowcast.attach(model, plan, prompt_chunks=2, simulate=simulate):
        output = model(ids, logits_to_keep=num_kept, use_cache=use_cache)
        return output.logits, output.past_key_values is not None


@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_are_those_asked_for(ranks: Pools, tmp_path: Path, use_cache: bool) -> None:
    folder, ids = save_random("llama", tmp_path / "model"), random_ids(2, LENGTH)
    planned(folder, 2)
    whole, _ = kept(folder, ids, 0, use_cache, simulate=True)
    for num_kept in 1, 23, 24, LENGTH:
        for logits, has_cache in ranks(2).run(kept, folder, ids, num_kept, use_cache):
            assert torch.equal(logits, whole[:, -num_kept:])
            assert has_cache is use_cache


def test_a_cache_that_was_given_is_the_one_that_is_filled(tmp_path: Path) -> None:
    """Also one that makes its layers as they come, and has none yet."""
    folder = save_random("llama", tmp_path / "model")
    plan, model = planned(folder, 2), transformers.load(folder)
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True, prompt_chunks=2) as handle:
        for cache in DynamicCache(), DynamicCache(config=model.config):
            output = model(random_ids(1, 40), past_key_values=cache)
            assert output.past_key_values is cache and cache.get_seq_length() == 40
    assert handle.report().prompts == {"in halves": 2}


CODECS = "bf16", "int8-group128", "allocated(bits=3)", "transform(bits=3)"


@pytest.mark.parametrize("codec", CODECS)
def test_every_kind_of_codec(ranks: Pools, tmp_path: Path, codec: str) -> None:
    folder, inputs = save_random("llama", tmp_path / "model"), padded()
    plan = planned(folder, 2, codec)
    logits, text, _ = answers(transformers.load(folder), plan, inputs, simulate=True)
    for found in ranks(2).run(on_rank, folder, inputs, "auto"):
        assert torch.equal(found[0], logits)
        assert torch.equal(found[1], text)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_whole_experts_on_ranks(ranks: Pools, tmp_path: Path, name: str) -> None:
    folder, inputs = save_random(name, tmp_path / "model"), padded()
    whole, split = transformers.load(folder), Split(tp_size=2, experts="all_reduce")
    plan = narrowcast.calibrate(whole, [random_ids(2, 40, seed=1)], tp_size=2, experts="all_reduce")
    plan.save(folder / "plan")
    logits, text, _ = answers(whole, plan, inputs, simulate=True)
    for found in ranks(2).run(on_rank_of, split, folder, inputs):
        assert torch.equal(found[0], logits)
        assert torch.equal(found[1], text)


def on_rank_of(split: Split, folder: Path, inputs: dict[str, Tensor]) -> Any:
    return answers(transformers.load(folder, split=split), Plan.load(folder / "plan"), inputs)


def test_nodes(ranks: Pools, tmp_path: Path) -> None:
    folder, inputs = save_random("llama", tmp_path / "model"), padded()
    model = transformers.load(folder)
    plan = narrowcast.calibrate(model, [random_ids(2, 40)], tp_size=4, groups=[[0, 1], [2, 3]])
    plan.save(folder / "plan")
    logits, text, _ = answers(model, plan, inputs, simulate=True)
    for found in ranks(4).run(on_rank, folder, inputs, "auto"):
        assert torch.equal(found[0], logits)
        assert torch.equal(found[1], text)


# What cannot run in halves, by the reason that the report gives.
def short(model: Any, ids: Tensor) -> None:
    model(ids[:, :31])


def continued(model: Any, ids: Tensor) -> None:
    cache = model(ids[:, :4]).past_key_values
    model(ids, past_key_values=cache)


def embedded(model: Any, ids: Tensor) -> None:
    model(inputs_embeds=model.get_input_embeddings()(ids))


def labelled(model: Any, ids: Tensor) -> None:
    model(ids, labels=ids)


def with_hidden_states(model: Any, ids: Tensor) -> None:
    model(ids, output_hidden_states=True)


def chosen_logits(model: Any, ids: Tensor) -> None:
    model(ids, logits_to_keep=torch.tensor([3, 5]))


def compiled(model: Any, ids: Tensor) -> None:
    torch._dynamo.reset()
    torch.compile(model, backend="eager")(ids)


REASONS = {
    short: {},
    continued: {"one forward: a filled cache": 1},
    embedded: {},
    labelled: {"one forward: labels given": 1},
    with_hidden_states: {"one forward: output_hidden_states given": 1},
    chosen_logits: {"one forward: logits of chosen places": 1},
    compiled: {},
}


@pytest.mark.parametrize("forward", REASONS)
def test_what_cannot_be_halved_runs_as_one_and_says_why(tmp_path: Path, forward: Callable[[Any, Tensor], None]) -> None:
    folder = save_random("llama", tmp_path / "model")
    plan, model = planned(folder, 2), transformers.load(folder)
    with torch.no_grad(), narrowcast.attach(model, plan, simulate=True, prompt_chunks=2) as handle:
        forward(model, random_ids(1, 40))
    assert handle.report().prompts == REASONS[forward]


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "mixtral"])
@pytest.mark.parametrize("split", [Split(pp_size=2), Split(tp_size=2, pp_size=2)], ids=str)
def test_while_one_half_is_in_the_next_stage_the_other_is_in_this_one(
    ranks: Pools, tmp_path: Path, name: str, split: Split
) -> None:
    folder = save_random(name, tmp_path / "model")
    inputs, model = padded(), transformers.load(folder)
    plan = narrowcast.calibrate(model, [random_ids(2, 40)], tp_size=split.tp_size, pp_size=split.pp_size)
    plan.save(folder / "plan")
    logits, text, report = answers(model, plan, inputs, simulate=True)
    assert report.prompts == {"in halves": 2}
    for found in ranks(split.world_size).run(on_rank_of, split, folder, inputs):
        assert torch.equal(found[0], logits)
        assert torch.equal(found[1], text)
        assert found[2].prompts == {"in halves": 2}


def fails_in_the_second_half(folder: Path, inputs: dict[str, Tensor]) -> tuple[bool, Tensor]:
    """Whether the error came through, and what the model answers afterwards."""
    plan = Plan.load(folder / "plan")
    model: Any = transformers.load(folder, split=plan.split)

    def fail(module: Any, args: Any) -> None:
        if args[0].shape[1] == 23:
            raise ZeroDivisionError("oh")

    with torch.no_grad(), narrowcast.attach(model, plan, prompt_chunks=2, algorithm="two_shot"):
        hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        try:
            model(**inputs)
            failed = False
        except ZeroDivisionError:
            failed = True
        hook.remove()
        return failed, model(**inputs).logits


def test_an_error_in_one_half_ends_the_other_and_leaves_the_ranks_in_step(ranks: Pools, tmp_path: Path) -> None:
    folder, inputs = save_random("llama", tmp_path / "model"), padded()
    logits, _, _ = answers(transformers.load(folder), planned(folder, 2), inputs, algorithm="two_shot", simulate=True)
    for failed, found in ranks(2).run(fails_in_the_second_half, folder, inputs):
        assert failed
        assert torch.equal(found, logits)


def refusal(folder: Path, view_of_chunks: bool) -> str:
    from narrowcast.engines.transformers.seam import halves

    plan = Plan.load(folder / "plan")
    model, as_of = transformers.load(folder, split=plan.split), halves.as_of
    halves.as_of = as_of if view_of_chunks else lambda cache, start: cache
    try:
        narrowcast.attach(model, plan, prompt_chunks=2).remove()
    except InvalidInputError as error:
        return str(error)
    finally:
        halves.as_of = as_of
    return ""


@pytest.mark.parametrize("name", ["gemma3", "qwen3-next"])
def test_a_model_that_turns_make_wrong_is_refused(ranks: Pools, tmp_path: Path, name: str) -> None:
    """Found by trying: these are silently wrong where a half sees lengths of a cache that the other is writing."""
    folder = save_random(name, tmp_path / "model")
    planned(folder, 2)
    assert all("another one on ranks [0, 1]" in each for each in ranks(2).run(refusal, folder, False))
    assert not any(ranks(2).run(refusal, folder, True))


def scores(job: Job) -> list[Outcome]:
    return on_ranks._on_rank(job, Split(tp_size=2))


def test_an_evaluation_in_halves_is_the_same_on_real_ranks(ranks: Pools, tmp_path: Path) -> None:
    """Figures and report; in FP32, where the reference is one forward."""
    folder, batches = save_random("llama", tmp_path / "model", torch.float32), [random_ids(2, LENGTH)]
    planned(folder, 2)
    job = Job(model=str(folder), plans=[folder / "plan"], batches=batches, prompt_chunks=2)
    found = evaluate(transformers.load(folder), Plan.load(folder / "plan"), batches, prompt_chunks=2)
    (first,), _ = ranks(2).run(scores, job)
    assert first.score is not None and first.score.kl_nats == pytest.approx(found.score.kl_nats, rel=1e-2)
    assert first.report.prompts == found.report.prompts == {"in halves": 1}


def test_the_table_decides_from_which_length_on() -> None:
    """A wait of 1 ms a token, a quarter of which is counted on, against a pass over the weights at 1 GB/s."""
    table = Decisions(waits={96: [(1, 0.001), (1024, 1.024)]}, weights_gbps=1.0)
    assert table.halves_from(96, 7e6) == 32  # 8 ms against 7
    assert table.halves_from(96, 12e6) == 64
    assert table.halves_from(96, 400e6) == 2048, "in proportion beyond what was measured"
    assert table.halves_from(96, 1e15) is None
    assert table.halves_from(95, 1.0) is None and Decisions().halves_from(96, 1.0) is None
    nothing = Decisions(waits={96: [(1, 0.0), (64, 0.0)]}, weights_gbps=1.0)
    assert nothing.halves_from(96, 1.0) is None


def prompts_of(folder: Path, plan: bytes, lengths: Sequence[int], **options: Any) -> dict[str, int]:
    loaded = Plan.from_bytes(plan, "memory")
    model: Any = transformers.load(folder, split=loaded.split)
    with torch.no_grad(), narrowcast.attach(model, loaded, **options) as handle:
        for length in lengths:
            model(random_ids(1, length))
        return dict(handle.report().prompts)


def test_auto_halves_prompts_of_a_pipeline(ranks: Pools, tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "model")
    plan = narrowcast.calibrate(transformers.load(folder), [random_ids(2, 40)], tp_size=1, pp_size=2).to_bytes()
    run = partial(ranks(2).run, prompts_of, folder, plan)
    assert run((127, 128)) == [{"in halves": 1}] * 2
    assert ranks(2).run(partial(prompts_of, deterministic=True), folder, plan, (128,)) == [{}] * 2


def test_auto_goes_by_the_table(ranks: Pools, tmp_path: Path) -> None:
    """Weights of 0.3 MB a rank between five sums: 64 tokens on."""
    folder = save_random("llama", tmp_path / "model")
    plan, run = planned(folder, 2), partial(ranks(2).run, prompts_of, folder)
    assert run(plan.to_bytes(), (32, 64, 100)) == [{}, {}], "not tuned"
    num_bytes = sum(weight.nbytes for weight in transformers.load(folder).parameters()) / 2 / 4
    waits = {96: [(1, 0.001), (1024, 1.024)]}
    tuned = replace(plan, decisions=Decisions(waits=waits, weights_gbps=num_bytes / 12e6)).to_bytes()
    assert run(tuned, (32, 64, 100)) == [{"in halves": 2}] * 2
    assert ranks(2).run(partial(prompts_of, prompt_chunks=1), folder, tuned, (64,)) == [{}] * 2
    assert ranks(2).run(partial(prompts_of, deterministic=True), folder, tuned, (64,)) == [{}] * 2


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "model")
    plan, model = planned(folder, 2), transformers.load(folder)
    with pytest.raises(InvalidInputError, match="expected auto, 1 or 2"):
        narrowcast.attach(model, plan, simulate=True, prompt_chunks=4)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="rounds otherwise"):
        narrowcast.attach(model, plan, simulate=True, prompt_chunks=2, deterministic=True)


# Ways of a sum from as many tokens on: the halves, of 44 and 46 tokens, take different ones.
TABLES = {
    "fewer steps later": ((1, Choice("coded", "two_shot")), (45, Choice("coded", "one_shot"))),
    "more steps later": ((1, Choice("coded", "one_shot")), (45, Choice("coded", "two_shot"))),
    "no turns later": ((1, Choice("coded", "two_shot")), (45, Choice("native"))),
    "no turns first": ((1, Choice("native")), (45, Choice("coded", "two_shot"))),
}


@pytest.mark.parametrize("table", TABLES)
def test_halves_may_take_different_ways(ranks: Pools, tmp_path: Path, table: str) -> None:
    """Neither overtakes the other, however many turns its sums take."""
    folder, inputs = save_random("llama", tmp_path / "model"), padded()
    plan = replace(planned(folder, 2), decisions=Decisions(coded={96: TABLES[table]}))
    plan.save(folder / "plan", overwrite=True)
    logits, text, _ = answers(transformers.load(folder), plan, inputs, simulate=True)
    for found in ranks(2).run(on_rank, folder, inputs, "auto"):
        assert torch.equal(found[0], logits)
        assert torch.equal(found[1], text)


class Waited:
    """A transport whose exchanges say whether they were waited for."""

    def __init__(self) -> None:
        self.collectives, self.waited = Collectives(), 0

    def exchange(self, sends: Any, recvs: Any, *, tag: int) -> "Waited":
        return self

    def wait(self) -> None:
        self.waited += 1


def test_what_travels_is_waited_for_where_the_other_half_fails() -> None:
    """One exchange, as on every rank; and none after Ctrl-C, as nobody may be there."""
    for error, waited in (ZeroDivisionError, 1), (KeyboardInterrupt, 0):

        def fail(error: type[BaseException] = error) -> None:
            raise error

        transport: Any = Waited()
        pending = Pending(iter([Exchange([], [], 0)] * 2), transport)  # type: ignore[arg-type]
        with pytest.raises(error):
            pending.wait(fail)
        assert transport.waited == waited
        assert not transport.collectives.under_way
