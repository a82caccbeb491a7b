"""Zero-shot tasks: lm-evaluation-harness asks and scores; what it is asked, and what its answers come to, is ours."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import narrowcast
from commands import typed
from conftest import MODEL
from narrowcast import InvalidInputError, Plan
from narrowcast.engines import load_engine
from narrowcast.evaluation.tasks import Answer, TaskAnswers, TaskSet, answer, compare, load_tasks, task_items
from narrowcast.evaluation.tasks.figures import wilson
from narrowcast.plan.split import Split
from ranks import Ranks

QUERY = {"query": "Question: What falls from clouds?", "choices": ["rain", " stones", "horses"], "gold": 0}
EXAMPLES = Path(__file__).parents[1] / "examples" / "tasks"
ROWS = {
    "arc_easy": [
        QUERY,
        {"query": "Question: Who sails a ship?", "choices": ["a sailor", "a table", "a cloud"], "gold": 1},
    ],
    "boolq": [{"query": "Passage: The sea is wide.\nQuestion: is the sea wide?", "choices": ["no", "yes"], "gold": 1}],
    "piqa": [{"query": "Question: sweep\n", "choices": ["with a broom", "with a spoon"], "gold": 0}],
    "hellaswag": [
        {"query": "She opened the door and", "choices": [" went into the room.", "of of the to."], "gold": 0},
        {"query": "He took his hat, bowed, and", "choices": ["left.", " were the very house of it."], "gold": 0},
    ],
    "winogrande": [
        {
            "context_options": ["Anna thanked Mary, for Anna", "Anna thanked Mary, for Mary"],
            "continuation": "had helped.",
            "gold": 1,
        },
        {"context_options": ["The King said to him that", "The of said to"], "continuation": "he was come.", "gold": 0},
    ],
    "lambada_openai": [
        {"context": "He looked at her, and she looked at", "continuation": "him"},
        {"context": "It was the best of times, it was the worst of", "continuation": "zebras"},
    ],
}


@pytest.fixture
def harness() -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'narrowcast[tasks]'")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The examples' tasks beside data of their own."""
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True)
    for name, rows in ROWS.items():
        write(tmp_path / f"{name}.jsonl", rows)
        of_files(tmp_path, name, tmp_path / f"{name}.jsonl")
    return tmp_path


def of_files(folder: Path, name: str, data: Path) -> str:
    """The task on that file, wherever it is run: tests have no folder of their own to run in."""
    path = folder / f"{name}.yaml"
    text = (EXAMPLES / path.name).read_text(encoding="utf8")
    found = f"data_files: {{test: {name}.jsonl}}"
    assert found in text
    path.write_text(
        text.replace(found, f"data_files: {{test: {data}}}, cache_dir: {folder / 'cache'}"), encoding="utf8"
    )
    return str(path)


def of(folder: Path, *names: str) -> list[str]:
    return [str(folder / f"{name}.yaml") for name in names]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """In FP32, where another shape of batch makes no difference that could change an answer."""
    return load_engine().load(MODEL).float()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_engine().load_tokenizer(MODEL)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


def answers(*items: tuple[int, bool]) -> TaskAnswers:
    return TaskAnswers(items=[Answer(*item) for item in items])


# Figures, from answers made by hand.


def test_figures_of_a_task() -> None:
    """Four items: one kept right, one lost, one gained by another choice, one wrong in another way."""
    uncompressed = answers((0, True), (1, True), (2, False), (3, False))
    coded = answers((0, True), (0, False), (1, True), (2, False))
    figures = compare({"a": uncompressed}, {"a": coded}).tasks["a"]
    assert (figures.num_items, figures.accuracy_uncompressed, figures.accuracy) == (4, 0.5, 0.5)
    assert (figures.kept_percent, figures.changed) == (100.0, 0.75)


def test_the_mean_counts_every_task_alike_and_changes_by_item() -> None:
    """1 of 2 right, and 4 of 4; coded, all of 2 and 1 of 4: 75 % becomes 62.5 %."""
    uncompressed = {"small": answers((0, True), (0, False)), "large": answers(*[(0, True)] * 4)}
    coded = {"small": answers((0, True), (1, True)), "large": answers((0, True), *[(1, False)] * 3)}
    comparison = compare(uncompressed, coded)
    assert (comparison.mean.accuracy_uncompressed, comparison.mean.accuracy) == (0.75, 0.625)
    assert comparison.mean.kept_percent == pytest.approx(100 * 0.625 / 0.75)
    assert (comparison.mean.num_items, comparison.mean.changed) == (6, 4 / 6)
    assert comparison.tasks["large"].kept_percent == 25


def test_nothing_is_kept_of_nothing() -> None:
    figures = compare({"a": answers((0, False))}, {"a": answers((1, True))}).tasks["a"]
    assert figures.kept_percent is None and figures.kept_interval is None and figures.changed == 1


def test_one_item_says_nothing_about_what_is_kept() -> None:
    figures = compare({"a": answers((0, True))}, {"a": answers((0, True))}).tasks["a"]
    assert (figures.kept_percent, figures.kept_interval) == (100, None)


def test_answers_to_other_items_are_not_compared() -> None:
    for other in ({"a": answers((0, True))}, {"b": answers((0, True), (0, True))}, {}):
        with pytest.raises(InvalidInputError, match="same items of the same tasks"):
            compare({"a": answers((0, True), (0, True))}, other)


def test_wilson_as_tabulated() -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I: 81/263, 15/148, 0/20, 1/29."""
    for (count, total), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0000, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(count, total) == pytest.approx(expected, abs=5e-5)


def test_the_interval_of_what_is_kept_is_the_paired_bootstraps() -> None:
    """To first order, so that of many items: ends within a twentieth of the width of the bootstrap's."""
    stats = pytest.importorskip("scipy.stats", reason="needs scipy, which comes with lm-eval")
    random = np.random.default_rng(0)
    tasks = []
    for size, accuracy in ((1200, 0.7), (800, 0.4)):
        right = random.random(size) < accuracy
        tasks.append((right, np.where(random.random(size) < 0.8, random.random(size) < accuracy / 4, right)))
    first = compare(*as_answers(tasks[:1])).mean
    ratio = lambda plain, coded, axis: 100 * coded.mean(axis) / plain.mean(axis)  # noqa: E731
    found = stats.bootstrap(tasks[0], ratio, paired=True, vectorized=True, n_resamples=4000, rng=0).confidence_interval
    assert first.kept_interval == pytest.approx((found.low, found.high), abs=(found.high - found.low) / 20)

    both = compare(*as_answers(tasks)).mean
    draws = []
    for _ in range(4000):
        picks = [random.integers(len(plain), size=len(plain)) for plain, _ in tasks]
        means = [(p[i].mean(), c[i].mean()) for (p, c), i in zip(tasks, picks, strict=True)]
        draws.append(100 * sum(c for _, c in means) / sum(p for p, _ in means))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert both.kept_interval == pytest.approx((low, high), abs=(high - low) / 20)


def as_answers(tasks: list[Any]) -> tuple[dict[str, TaskAnswers], ...]:
    return tuple(
        {str(n): answers(*((int(right), bool(right)) for right in task[side])) for n, task in enumerate(tasks)}
        for side in (0, 1)
    )


def test_items_are_json() -> None:
    items = task_items({"a": answers((2, True), (0, False))})
    assert json.loads(json.dumps(items)) == {"a": [[2, 1], [0, 0]]}


# What the harness is asked.


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "arc_easy": [
            ("Question: What falls from clouds?\nAnswer:", f" {text}") for text in ("rain", "stones", "horses")
        ],
        "boolq": [
            ("Passage: The sea is wide.\nQuestion: is the sea wide?\nAnswer:", " no"),
            ("Passage: The sea is wide.\nQuestion: is the sea wide?\nAnswer:", " yes"),
        ],
        "piqa": [("Question: sweep\nAnswer:", " with a broom"), ("Question: sweep\nAnswer:", " with a spoon")],
        "hellaswag": [
            ("She opened the door and", " went into the room."),
            ("She opened the door and", " of of the to."),
        ],
        "winogrande": [
            ("Anna thanked Mary, for Anna", " had helped."),
            ("Anna thanked Mary, for Mary", " had helped."),
        ],
        "lambada_openai": [("He looked at her, and she looked at", " him")],
    }.items(),
)
def test_prompts(harness: None, folder: Path, name: str, expected: list[tuple[str, str]]) -> None:
    (task,) = load_tasks(TaskSet(names=of(folder, name))).values()
    task.build_all_requests(limit=1)
    assert [request.args for request in task.instances] == expected


def test_wrong_names_and_numbers(harness: None, folder: Path) -> None:
    (arc,) = of(folder, "arc_easy")
    (folder / "piqa.jsonl").unlink()
    for names, limit, message in (
        (["arc_hard"], None, "task arc_hard: expected names of tasks of lm-eval, or YAML files"),
        (of(folder, "arc_hard"), None, "arc_hard.yaml: expected names of tasks"),
        (of(folder, "piqa"), None, "or files that are there, found .*piqa.jsonl"),
        ([], None, "each name once, found none"),
        ([arc, arc], None, "each name once, found .*arc_easy.yaml, .*arc_easy.yaml"),
        ([arc], 0, "1 item or more, found 0"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            load_tasks(TaskSet(names=names, limit=limit))


# What it answers.


@torch.no_grad()
def log_likelihood(model: torch.nn.Module, tokenizer: Any, context: str, text: str) -> tuple[float, bool]:
    """Of `text` after `context`, and whether greedy decoding says it: one forward, no batch, no harness."""
    ids = tokenizer(context + text, return_tensors="pt").input_ids
    start = len(tokenizer(context).input_ids) - ids.shape[1]  # from the end
    logits = model(input_ids=ids[:, -513:-1]).logits[0, start:].double()
    targets = ids[0, start:]
    found = logits.log_softmax(-1).gather(-1, targets[:, None]).sum().item()
    return found, bool((logits.argmax(-1) == targets).all())


def likeliest(model: torch.nn.Module, tokenizer: Any, pairs: list[tuple[str, str]]) -> int:
    return int(np.argmax([log_likelihood(model, tokenizer, *pair)[0] for pair in pairs]))


def test_answers_are_those_of_plain_log_likelihoods(
    harness: None, folder: Path, model: torch.nn.Module, tokenizer: Any
) -> None:
    found = answer(model, tokenizer, TaskSet(names=of(folder, *ROWS)))
    for name, rows in ROWS.items():
        assert len(found[name].items) == len(rows)
        for row, item in zip(rows, found[name].items, strict=True):
            if name == "lambada_openai":
                greedy = log_likelihood(model, tokenizer, row["context"], f" {row['continuation']}")[1]
                assert item == Answer(int(greedy), greedy)
                continue
            if name == "winogrande":
                pairs = [(context, f" {row['continuation']}") for context in row["context_options"]]
            else:
                context = row["query"].rstrip() + ("" if name == "hellaswag" else "\nAnswer:")
                pairs = [(context, f" {choice.strip()}") for choice in row["choices"]]
            chosen = likeliest(model, tokenizer, pairs)
            assert item == Answer(chosen, chosen == row["gold"])
    assert len({item.correct for task in found.values() for item in task.items}) == 2
    targets = [(row["context"], f" {row['continuation']}") for row in ROWS["lambada_openai"]]
    mean = np.mean([log_likelihood(model, tokenizer, *target)[0] for target in targets])
    assert found["lambada_openai"].perplexity == pytest.approx(math.exp(-mean), rel=1e-4)


def test_what_does_not_fit_loses_its_beginning_and_is_counted(
    harness: None, folder: Path, model: torch.nn.Module, tokenizer: Any
) -> None:
    """The bundled model reads 512 tokens."""
    ends = "She opened the door and", "He took his hat, bowed, and", "They were"
    long = [{**ROWS["hellaswag"][0], "query": "The sea was calm. " * 200 + end} for end in ends]
    write(folder / "hellaswag.jsonl", [*long, *ROWS["hellaswag"]])
    found = answer(model, tokenizer, TaskSet(names=of(folder, "hellaswag")))["hellaswag"]
    assert found.num_truncated == 3
    for row, item in zip(long, found.items, strict=False):
        pairs = [(row["query"], f" {choice.strip()}") for choice in row["choices"]]
        assert item.chosen == likeliest(model, tokenizer, pairs)


def test_fifty_items_of_arc_easy_one_by_one(
    harness: None, shared: Path, folder: Path, model: torch.nn.Module, tokenizer: Any
) -> None:
    data = shared / "data" / "eval" / "arc_easy.jsonl"
    found = answer(model, tokenizer, TaskSet(names=[of_files(folder, "arc_easy", data)], limit=50))["arc_easy"]
    lines = data.read_text(encoding="utf8").splitlines()
    for line, item in itertools.zip_longest(lines[:50], found.items):
        row = json.loads(line)
        pairs = [(f"{row['query']}\nAnswer:", f" {choice}") for choice in row["choices"]]
        chosen = likeliest(model, tokenizer, pairs)
        assert item == Answer(chosen, chosen == row["gold"])


def test_an_uncompressed_model_is_scored_as_the_harness_alone_scores_it(harness: None, folder: Path) -> None:
    """Loaded by the harness, and asked by a configuration in its own template language."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    config = {
        "task": "theirs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "arc_easy.jsonl"), "cache_dir": str(folder / "cache")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "{{choices | map('trim') | list}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    theirs = simple_evaluate(
        "hf",
        {"pretrained": str(MODEL), "softmax_dtype": "float32"},
        tasks=[config],
        batch_size=8,
        device="cpu",
        task_manager=TaskManager(include_defaults=False),
    )
    ours = answer(
        load_engine().load(MODEL),
        load_engine().load_tokenizer(MODEL),
        TaskSet(names=of(folder, "arc_easy")),
    )
    expected = [
        Answer(int(np.argmax([each[0] for each in sample["filtered_resps"]])), bool(sample["acc"]))
        for sample in theirs["samples"]["theirs"]
    ]
    assert list(ours["arc_easy"].items) == expected
    assert theirs["results"]["theirs"]["acc,none"] == np.mean([item.correct for item in expected])


def test_without_a_file_tasks_are_the_harnesss_own(
    harness: None, monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module, tokenizer: Any, folder: Path
) -> None:
    """ARC-easy as the hub lays it out gives the answers of the file; the hub itself is out of reach here."""
    import datasets

    rows = [
        {
            "question": row["query"].removeprefix("Question: "),
            "choices": {"text": [choice.strip() for choice in row["choices"]], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[row["gold"]],
        }
        for row in ROWS["arc_easy"]
    ]
    hub = {("allenai/ai2_arc", "ARC-Easy"): datasets.DatasetDict(test=datasets.Dataset.from_list(rows))}
    hub["allenai/ai2_arc", "ARC-Easy"]["train"] = hub["allenai/ai2_arc", "ARC-Easy"]["test"]
    from_files = answer(model, tokenizer, TaskSet(names=of(folder, "arc_easy")))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **_: hub[path, name])
    found = answer(model, tokenizer, TaskSet(names=["arc_easy"]))
    assert task_items(found) == task_items(from_files)
    with pytest.raises(InvalidInputError, match="task arc_hard: expected names of tasks of lm-eval"):
        load_tasks(TaskSet(names=["arc_easy", "arc_hard"]))


# With a plan attached.


@pytest.fixture(scope="module")
def plan() -> Plan:
    model, tokenizer = load_engine().load(MODEL), load_engine().load_tokenizer(MODEL)
    text = (MODEL / "calibration.txt").read_text(encoding="utf8")
    batches = tokenizer(text, return_tensors="pt").input_ids[:, :512].split(64, dim=1)
    return narrowcast.calibrate(model, batches, tp_size=2, codec="feature(bits=2)")


def coded_on_rank(path: Path, tasks: TaskSet) -> Any:
    model = load_engine().load(MODEL, split=Split(tp_size=2))
    with narrowcast.attach(model, Plan.load(path)):
        return task_items(answer(model, load_engine().load_tokenizer(MODEL), tasks))


def test_real_ranks_answer_as_simulated(harness: None, ranks: Callable[[int], Ranks], plan: Plan, folder: Path) -> None:
    """No rank takes a share of the items: each answers all. What coarse codes lose is lost, so that answers change."""
    plan = replace(plan, feedback=plan.feedback.turned_off())
    tasks = TaskSet(names=of(folder, "arc_easy", "hellaswag", "winogrande", "piqa"))
    plan.save(folder / "plan")
    model, tokenizer = load_engine().load(MODEL), load_engine().load_tokenizer(MODEL)
    before = answer(model, tokenizer, tasks)
    with narrowcast.attach(model, plan, simulate=True):
        simulated = answer(model, tokenizer, tasks)
    assert ranks(2).run(coded_on_rank, folder / "plan", tasks) == [task_items(simulated)] * 2
    assert task_items(answer(model, tokenizer, tasks)) == task_items(before)
    assert compare(before, simulated).mean.changed > 0


# The command.


def evaluate(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "narrowcast", "evaluate", str(MODEL), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=150, env={**os.environ, "COLUMNS": "100", **environment}
    )


def test_evaluate_reports_tasks(harness: None, plan: Plan, folder: Path) -> None:
    plan.save(folder / "plan")
    quick = "--plan", folder / "plan", "--num-samples", 1, "--max-seq-len", 32
    tasks = "--tasks", ", ".join(of(folder, "arc_easy", "lambada_openai"))
    done = evaluate(*quick, *tasks, "--json", folder / "report.json")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()  # no bars where nobody watches, no remarks of the harness
    assert all(line.startswith("narrowcast: ") and line.endswith(" s so far") for line in lines)
    assert "arc_easy" in done.stdout and "mean" in done.stdout and "lambada_openai: perplexity" in done.stdout
    report = json.loads((folder / "report.json").read_text(encoding="utf8"))
    assert report["command"].startswith(f"narrowcast evaluate {MODEL}") and report["narrowcast"]["lm-eval"]
    assert report["num_tokens"] == 32  # the text is scored besides
    found = report["tasks"]
    assert found["by_task"]["arc_easy"]["num_items"] == 2 and found["mean"]["num_items"] == 4
    items = {side: found["items"][side]["arc_easy"] for side in ("uncompressed", "coded")}
    assert found["by_task"]["arc_easy"]["changed"] == np.mean(
        [a[0] != b[0] for a, b in zip(items["uncompressed"], items["coded"], strict=True)]
    )
    assert found["by_task"]["lambada_openai"]["perplexity"] > 1

    typed("evaluate", MODEL, *quick, *tasks, "--limit", 1, "--json", folder / "report.json")
    report = json.loads((folder / "report.json").read_text(encoding="utf8"))
    assert report["tasks"]["by_task"]["arc_easy"]["num_items"] == 1


def test_evaluate_refuses_before_it_loads_a_model(harness: None, plan: Plan, folder: Path) -> None:
    plan.save(folder / "plan")
    for arguments, message in (
        (("--tasks", "arc_hard"), "task arc_hard: expected names of tasks of lm-eval"),
        (("--tasks", *of(folder, "arc_easy"), "--limit", 0), "limit: expected 1 item or more, found 0"),
        (("--limit", 5), "--limit: expected --tasks with it"),
    ):
        done = typed("evaluate", MODEL, "--plan", folder / "plan", *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(f"narrowcast: error: {message}"), done.stderr


def test_without_the_extra_one_sentence_says_what_to_install(plan: Plan, folder: Path) -> None:
    plan.save(folder / "plan")
    (folder / "lm_eval.py").write_text("raise ModuleNotFoundError('no', name='lm_eval')")
    done = evaluate("--plan", folder / "plan", "--tasks", "arc_easy", PYTHONPATH=str(folder))
    assert done.stderr == "narrowcast: error: lm-eval is not installed: run pip install 'narrowcast[tasks]'\n"
    assert done.returncode == 1
