"""Serving, as clients of OpenAI meet it: the same answers as `generate`, whoever else asks, leaves or is slow."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx2
import openai
import pytest
import torch
from openai import OpenAI
from torch import Tensor, nn

from commands import refused, save_plan, typed
from conftest import MODEL
from narrowcast.engines import load_engine
from narrowcast.evaluation.continuations import GREEDY, continuations
from narrowcast.monitoring import Snapshot
from narrowcast.runtime.reports import Report
from narrowcast.serving import Job, serve
from narrowcast.serving.answer import Answer
from narrowcast.serving.board import Board
from narrowcast.serving.chat import Local, Partner, Remote, Say, converse
from narrowcast.serving.choosing import Chooser, scored
from narrowcast.serving.desk import ClosedError, Desk, FullError
from narrowcast.serving.leading import Leader
from narrowcast.serving.orders import Orders
from narrowcast.serving.requests import Piece, Request, Token
from narrowcast.serving.text import Spelling, Text
from narrowcast.transport import Buffers, Collectives, Transport
from servers import Command, Server

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
KEY = "secret"
RUNNING, WAITING = 16, 8
PROMPTS = [
    "The sea was",
    "Once upon a time there lived",
    "It is a truth",
    "Call me",
    "He said that",
    "In the",
    "My",
    "We",
]
LONG = 400  # tokens: seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "gutenberg-chat"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    limits = "--max-running", RUNNING, "--max-waiting", WAITING
    with Server(folder, "--dtype", "float32", "--api-key", KEY, *limits) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client(KEY) as client:
        yield client
    server.wait_until_idle()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_engine().load(MODEL, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_engine().load_tokenizer(MODEL)


def asked(prompt: Any, **more: Any) -> dict[str, Any]:
    """Arguments of a greedy completion."""
    return {"model": "gutenberg-chat", "prompt": prompt, "temperature": 0, "max_tokens": 24, **more}


def generated(model: nn.Module, tokenizer: Any, prompt: str, num_tokens: int) -> list[int]:
    """The tokens that generate adds."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    (found,) = continuations(model, [ids], num_tokens)
    return found


def test_the_model_is_listed(client: OpenAI) -> None:
    (found,) = client.models.list().data
    assert found.id == "gutenberg-chat"
    assert client.models.retrieve("gutenberg-chat").id == "gutenberg-chat"


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_greedy_answers_are_those_of_generate(client: OpenAI, model: nn.Module, tokenizer: Any, prompt: str) -> None:
    ids = generated(model, tokenizer, prompt, 24)
    answer = client.completions.create(**asked(prompt))
    (choice,) = answer.choices
    assert choice.text == tokenizer.decode(tokenizer(prompt).input_ids + ids)[len(prompt) :]
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    num_read = len(tokenizer(prompt).input_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_read, 24)


def test_texts_and_tokens_ask_for_the_same(client: OpenAI, tokenizer: Any) -> None:
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS[:2]]
    texts = [choice.text for choice in client.completions.create(**asked(PROMPTS[:2])).choices]
    assert [choice.text for choice in client.completions.create(**asked(ids)).choices] == texts
    assert [client.completions.create(**asked(each)).choices[0].text for each in ids] == texts
    assert [client.completions.create(**asked(each)).choices[0].text for each in PROMPTS[:2]] == texts


@pytest.mark.parametrize(
    "more", [{}, {"n": 2, "temperature": 1.0, "seed": 3}, {"stop": ["the", "zebra"]}, {"echo": True}]
)
def test_a_stream_says_what_a_whole_answer_does(client: OpenAI, more: dict[str, Any]) -> None:
    whole = client.completions.create(**asked(PROMPTS[:2], **more))
    texts, ends, usage = {}, {}, None
    for chunk in client.completions.create(
        **asked(PROMPTS[:2], **more), stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason is not None:
                ends[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage


def test_an_answer_ends_before_a_stop_string(client: OpenAI) -> None:
    text = client.completions.create(**asked(PROMPTS[1])).choices[0].text
    stop = text[9:14]
    (choice,) = client.completions.create(**asked(PROMPTS[1], stop=stop)).choices
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_a_seed_decides_what_is_drawn(client: OpenAI) -> None:
    def drawn(seed: int, **more: Any) -> list[str]:
        answer = client.completions.create(**asked("The", temperature=1.0, seed=seed, n=2, **more))
        return [choice.text for choice in answer.choices]

    first = drawn(1)
    assert first == drawn(1)
    assert first[0] != first[1]
    assert first != drawn(2)
    # Of nothing but the likeliest token, there is one answer.
    assert set(drawn(1, top_p=1e-6)) == {client.completions.create(**asked("The")).choices[0].text}


def test_scores_of_a_prompt_are_those_of_a_plain_forward(client: OpenAI, model: nn.Module, tokenizer: Any) -> None:
    """As lm-eval asks for them: a token more, and prompts as tokens. Some are longer than what is scored at a time."""
    text = (MODEL / "scoring.txt").read_text()
    prompts = [tokenizer(text).input_ids[:length] for length in (3, 40, 300)]
    answer = client.completions.create(**asked(prompts, max_tokens=1, logprobs=1, echo=True, seed=1234))
    for choice, ids in zip(answer.choices, prompts, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)  # type: ignore[operator]
        found = choice.logprobs
        assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
        assert len(found.token_logprobs) == len(ids) + 1 and found.token_logprobs[0] is None
        own = expected[torch.arange(len(ids) - 1), ids[1:]]
        tolerance = 0.0 if len(ids) <= 256 else 1e-4  # a longer one is read in two parts, whose sums round otherwise
        assert found.token_logprobs[1:-1] == pytest.approx(own.tolist(), abs=tolerance, rel=0)
        likeliest = [max(top.values()) for top in found.top_logprobs[1:]]
        assert likeliest == pytest.approx(expected.max(dim=-1).values.tolist(), abs=tolerance, rel=0)
        assert found.token_logprobs[-1] == likeliest[-1]
        assert found.text_offset is not None and found.tokens is not None
        assert "".join(found.tokens) == choice.text
        assert all(map(choice.text.startswith, found.tokens, found.text_offset))


def test_a_prompt_alone_can_be_scored(client: OpenAI) -> None:
    (choice,) = client.completions.create(**asked("The sea was", max_tokens=0, logprobs=0, echo=True)).choices
    assert choice.text == "The sea was"
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None and max(choice.logprobs.token_logprobs[1:]) < 0


def test_a_chat_is_its_template_continued(client: OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who was it?"}]
    prompt = "system: Be brief.\nuser: Who was it?\nassistant:"
    text = client.completions.create(**asked(prompt, max_tokens=8)).choices[0].text
    settings: Any = {"model": "gutenberg-chat", "messages": messages, "temperature": 0, "max_tokens": 8}
    (choice,) = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2).choices
    assert choice.message.content == text
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert "".join(each.token for each in choice.logprobs.content) == text
    for each in choice.logprobs.content:
        assert [each.logprob, 2] == [each.top_logprobs[0].logprob, len(each.top_logprobs)]
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**settings, stream=True)]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == text


def test_two_hundred_requests_sixteen_at_once(client: OpenAI, model: nn.Module, tokenizer: Any) -> None:
    expected = [generated(model, tokenizer, prompt, 12) for prompt in PROMPTS]

    def ask(number: int) -> bool:
        place = number % len(PROMPTS)
        answer = client.completions.create(**asked(PROMPTS[place], max_tokens=12, logprobs=0))
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        spelling = Spelling(tokenizer)
        return logprobs.tokens == [spelling.of(id) for id in expected[place]]

    with ThreadPoolExecutor(16) as pool:
        right = list(pool.map(ask, range(200)))
    assert len(right) == 200 and all(right)


def left_alone(server: Server, body: dict[str, Any]) -> socket.socket:
    """A connection of a client that has asked, and reads nothing."""
    url = httpx2.URL(server.url)
    data = json.dumps(body).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((url.host, url.port))
    head = ["POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", f"Content-Length: {len(data)}"]
    connection.sendall("\r\n".join([*head, "", ""]).encode() + data)
    return connection


def wait_for(server: Server, num_requests: int) -> None:
    deadline = time.monotonic() + 20
    while server.num_running() != num_requests:
        assert time.monotonic() < deadline, f"{server.num_running()} requests, not {num_requests}"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_who_comes_too_late_is_told_and_who_leaves_makes_room(server: Server, client: OpenAI, stream: bool) -> None:
    places = RUNNING + WAITING
    body = asked("The", max_tokens=LONG, stream=stream, n=4)
    gone = [left_alone(server, body) for _ in range(places // 4)]
    wait_for(server, places)
    with pytest.raises(openai.RateLimitError, match=f"all {places} places are taken: try again in a moment"):
        client.completions.create(**asked("The"))
    for connection in gone:
        connection.close()
    server.wait_until_idle()  # long before those answers would have ended
    assert client.completions.create(**asked("The")).choices[0].text


def test_a_slow_client_holds_nobody_up(server: Server, client: OpenAI) -> None:
    """It reads nothing of a stream whose every token says much; the answer waits for it in the server."""
    slow = left_alone(server, asked("The", max_tokens=200, stream=True, logprobs=20, n=4))
    try:
        begun = time.monotonic()
        assert client.completions.create(**asked("The", max_tokens=4)).choices[0].text
        assert time.monotonic() - begun < 10
        server.wait_until_idle()
        assert b"200 OK" in slow.recv(1 << 16)
    finally:
        slow.close()


def test_nothing_is_left_of_a_mixed_load(server: Server, client: OpenAI) -> None:
    """Whole answers, several at once, scores, streams; some who leave after a word, or before any."""

    def ask(number: int) -> None:
        more = {"max_tokens": 1 + number % 40, "temperature": number % 2, "seed": number}
        arguments = asked(PROMPTS[number % len(PROMPTS)], **more)
        match number % 5:
            case 0:
                assert len(client.completions.create(**arguments, n=2).choices) == 2
            case 1:
                assert client.completions.create(**arguments, echo=True, logprobs=2).choices[0].finish_reason
            case 2:
                assert (
                    list(client.completions.create(**arguments, stream=True, stop=["e "]))[-1].choices[0].finish_reason
                )
            case 3:
                client.completions.create(**arguments, stream=True).close()
            case 4:
                with contextlib.suppress(openai.APITimeoutError):
                    client.with_options(timeout=0.03).completions.create(**arguments)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(100)))
    server.wait_until_idle()
    assert server.get("/health").status_code == 200


def test_only_who_has_the_key_is_served(server: Server) -> None:
    with server.client("another") as stranger, pytest.raises(openai.AuthenticationError, match="this server's API key"):
        stranger.models.list()
    assert server.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": "gpt-4"}, "model: expected 'gutenberg-chat', the one that is served, found 'gpt-4'"),
        ({"prompt": []}, "prompt: expected a text, token ids, or a list of either"),
        ({"prompt": [True]}, "prompt: expected a text, token ids, or a list of either"),
        ({"prompt": [5, 9999]}, "prompt: expected token ids below 4096, found 9999"),
        ({"max_tokens": 511}, "expected 512 tokens at most in prompt and answer, found 3 in the prompt and 511 to be"),
        ({"max_tokens": 0}, "max_tokens: expected 1 at least, or echo: true"),
        ({"temperature": -1}, "temperature: expected greater than or equal to 0, found -1"),
        ({"prompt": ["The"] * 2, "n": 13}, "expected 24 answers at most, prompts times n, found 26"),
        ({"n": 17}, "n: expected less than or equal to 16, found 17"),
        ({"stop": ""}, "stop.0: String should have at least 1 character"),
        ({"presence_penalty": 1}, "presence_penalty is not supported by this server: leave it out"),
        ({"beam": 1}, "beam is not supported by this server: leave it out"),
        ({"max_token": 1}, "max_token is not supported by this server: is max_tokens meant?"),
        ({"stream_options": {"usage": True}}, "stream_options.usage: not supported by this server: leave it out"),
        ({"temperature": "hot"}, "temperature: expected a valid number, found 'hot'"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(server: Server, changed: dict[str, Any], sentence: str) -> None:
    answer = post(server, json.dumps(asked("The sea was") | changed))
    assert answer.status_code == (404 if "model" in changed else 400)
    assert answer.json()["error"]["message"].startswith(sentence)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages: expected one at least, found none"),
        ([{"role": "tool", "content": "4"}], "messages.0.role: expected 'system', 'developer', 'user' or 'assistant'"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
            "messages.0.content: expected a text, or a list of parts of type text",
        ),
    ],
)
def test_messages_that_are_none(server: Server, messages: list[dict[str, Any]], sentence: str) -> None:
    body = {"model": "gutenberg-chat", "messages": messages}
    answer = post(server, json.dumps(body), "chat/completions")
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(sentence)


def test_what_asks_for_nothing_is_no_error(server: Server) -> None:
    harmless = {"best_of": 1, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "stop": None, "n": None}
    assert post(server, json.dumps(asked("The sea was") | harmless)).status_code == 200


def test_a_body_has_its_limit(server: Server) -> None:
    answer = post(server, json.dumps(asked("a" * (4 << 20))))
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "body: expected 4194304 bytes at most, found more"


def test_bodies_and_paths_that_are_none(server: Server) -> None:
    assert post(server, "{").json()["error"]["message"].startswith("Invalid JSON")
    assert server.get("/v2").json()["error"]["message"] == "GET /v2: Not Found"


def post(server: Server, body: str, to: str = "completions") -> httpx2.Response:
    return httpx2.post(f"{server.url}/{to}", content=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)


def in_background(client: OpenAI, **arguments: Any) -> tuple[threading.Thread, list[Any]]:
    """A completion that somebody else waits for: the thread, and where its outcome will be."""
    outcome: list[Any] = []

    def ask() -> None:
        try:
            outcome.append(client.completions.create(**arguments))
        except openai.APIError as error:
            outcome.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, outcome


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_be_finished(how: signal.Signals) -> None:
    """On two ranks without a plan."""
    with Command(MODEL, "-tp", 2) as server, server.client() as client:
        settings = {"model": "gutenberg-7m", "prompt": "The", "temperature": 0, "max_tokens": 100}
        thread, outcome = in_background(client, **settings)
        wait_for(server, 1)
        server.process.send_signal(how)
        while server.get("/health").status_code == 200:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="the server is being stopped"):
            client.completions.create(**settings)
        status, errors = server.ended()
        assert status == 0 and "error" not in errors
        assert server.last_words == "answering 1 more, for 20 s at most\n"
        thread.join()
    assert outcome[0].usage.completion_tokens == 100


def test_ranks_of_torchrun_finish_their_answers_too() -> None:
    """Its own status is that of a signal. The first rank has the figures of all."""
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "narrowcast"
    with Command(MODEL, "-tp", 2, launcher=torchrun) as server, server.client() as client:
        settings = {"model": "gutenberg-7m", "prompt": "The", "temperature": 0, "max_tokens": 100}
        thread, outcome = in_background(client, **settings)
        wait_for(server, 1)
        assert server.scrape().labels("narrowcast_info", "rank") == {"0", "1"}
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        assert outcome[0].usage.completion_tokens == 100
        status, errors = server.ended()
        assert status == 1 and "got signal: 15" in errors and "narrowcast: error" not in errors


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plan(tmp_path_factory.mktemp("plans") / "two", "int4-feature")


def test_ranks_with_a_plan_say_what_generate_does_and_a_lost_one_is_named(plan: Path, tmp_path: Path) -> None:
    settings = "--plan", plan, "--dtype", "float32"
    report = tmp_path / "report.json"
    done = typed("generate", MODEL, *settings, "--prompt", "The sea was", "--max-new-tokens", 24, "--json", report)
    assert done.returncode == 0, done.stderr
    (expected,) = json.loads(report.read_text())["answers"]
    with Command(MODEL, *settings, "--timeout", 20) as server, server.client() as client:
        wanted: dict[str, Any] = {"model": "gutenberg-7m", "prompt": "The sea was", "temperature": 0}
        assert client.completions.create(**wanted, max_tokens=24).choices[0].text == expected["text"]
        thread, outcome = in_background(client, **wanted, max_tokens=500)
        wait_for(server, 1)
        os.kill(server.ranks()[1], signal.SIGKILL)
        thread.join()
        assert "the model failed: lost rank 1 while" in str(outcome[0])
        health = server.get("/health")
        assert health.status_code == 503 and "lost rank 1" in health.json()["status"]
        status, errors = server.ended()
        assert status == 1 and "narrowcast: error: rank 1 was ended by SIGKILL\n" in errors


def test_what_cannot_be_served_is_refused_before_any_rank_starts(plan: Path) -> None:
    assert "-tp: expected 2, as the plan has it, found 4" in refused("serve", MODEL, "--plan", plan, "-tp", 4)
    assert "-tp: expected ranks that can share this model" in refused("serve", MODEL, "-tp", 3)
    assert "--max-len: expected 512 tokens at most" in refused("serve", MODEL, "--max-len", 513)


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "expected a free port at an address of this machine" in refused("serve", MODEL, "--port", port)


def typed_in(*lines: str) -> Callable[[], str]:
    """A reader of these lines, the last of which is followed by Ctrl-D."""
    left = iter(lines)

    def read() -> str:
        if (line := next(left, None)) is None:
            raise EOFError
        return line

    return read


def test_a_chat_with_a_server_is_one_with_the_model(server: Server, folder: Path) -> None:
    """The first answer is part of what the second one answers. The server's answers are as long as its room."""
    texts, warned = [], list[str]()
    remote = Remote(server.url.removesuffix("/v1"), api_key=KEY, sampling=GREEDY)
    local = Local(str(folder), dtype="float32", weights="stored", sampling=GREEDY)
    for partner in (remote, local):
        said: list[str] = []
        lines = typed_in("Who was it?", " ", "And then?")
        assert converse(Briefly(partner), lines, said.append, warned.append, system="Be brief.")
        texts.append("".join(said))
    assert texts[0] == texts[1] and not warned
    server.wait_until_idle()


class Briefly:
    """Ctrl-C after forty characters of each answer."""

    def __init__(self, partner: Partner) -> None:
        self._partner = partner

    def answer(self, messages: list[dict[str, str]], say: Say) -> None:
        num_left = 40

        def some(text: str) -> None:
            nonlocal num_left
            say(text[:num_left])
            num_left -= len(text)
            if num_left < 0:
                raise KeyboardInterrupt

        self._partner.answer(messages, some)


def test_an_answer_of_a_given_length_goes_on_after_the_end_of_its_text(tokenizer: Any) -> None:
    (end,) = tokenizer("a", add_special_tokens=False).input_ids
    logits_V = torch.nn.functional.one_hot(torch.tensor(end), 512).float()
    for ignore, finishes in ((False, ["stop"]), (True, [None, None, "length"])):
        request = Request(prompt=(5,), max_new_tokens=3, temperature=0, ignore_eos=ignore)
        answer = Answer(request, tokenizer, {end})
        assert [answer.take(logits_V).finish for _ in finishes] == finishes


def test_errors_are_part_of_a_chat_and_piped_ones_of_its_status(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lines, status in (("Who was it?\n", 0), (f"{'word ' * 600}\nWho was it?\n", 1)):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        done = typed("chat", server.url, "--api-key", KEY)
        assert done.returncode == status
        assert done.stdout.strip() and ">" not in done.stdout
        assert ("expected 512 tokens at most in prompt and answer" in done.stderr) == bool(status)


def test_a_port_that_is_taken_is_noticed_before_ranks_are_started(server: Server) -> None:
    port = server.address.partition(":")[2]
    with mock.patch("narrowcast.serving.ranks.Ranks", side_effect=AssertionError):
        found = refused("serve", MODEL, "--port", port)
    assert f"expected a free port at an address of this machine, found 127.0.0.1:{port} (Address" in found


def test_a_socket_in_the_file_system_is_left_to_the_rank(tmp_path: Path) -> None:
    with mock.patch("narrowcast.serving.ranks.Ranks", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        serve(Job(model=str(MODEL), host=f"unix:{tmp_path}/server"), print)
    assert not list(tmp_path.iterdir())


def test_who_cannot_chat() -> None:
    assert "expected a server of OpenAI's API, found [Errno 111] Connection refused" in refused(
        "chat", "http://127.0.0.1:9"
    )
    assert "expected a model with a chat template, found none" in refused("chat", MODEL)


# The parts


class Hasty(Desk):
    """A desk whose client leaves just as the model's thread says its last word."""

    def say(self, name: str, piece: Piece) -> None:
        if piece.finish is not None:
            self.withdraw([name])
        super().say(name, piece)


def test_who_leaves_at_the_last_word_is_no_trouble(model: nn.Module, tokenizer: Any) -> None:
    pages = load_engine().pages(model, num_tokens=128, max_requests=4, max_batch_tokens=16)
    desk, heard = Hasty(max_running=1, max_waiting=1, max_len=8), []
    desk.hand_in([(Request(prompt=(5, 6), max_new_tokens=2, temperature=0), heard.append)] * 2)
    desk.close("enough", within_s=60)
    Leader(desk, Board(desk.wake), pages, Orders(Alone(), nothing_sent), tokenizer, ends=()).run()
    assert [type(each) for each in heard] == [Piece, Piece]


class Alone(Transport):
    """One rank."""

    def __init__(self) -> None:
        self.rank, self.world_size, self.collectives = 0, 1, Collectives()

    def exchange(self, sends: Buffers, recvs: Buffers, *, tag: int) -> Any:
        return SimpleNamespace(wait=lambda: None)

    def native_all_reduce(self, x: Tensor) -> Tensor:
        return x

    def share(self, text: str, doing: str) -> list[str]:
        return [text]


def nothing_sent() -> Snapshot:
    return Snapshot.of(Report(sites={}), None, rank=0, num_ranks=1, transport="")


@pytest.mark.parametrize("package", ["fastapi", "prometheus_client"])
def test_without_a_package_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for module in [
        name for name in sys.modules if name.startswith(("narrowcast.serving.web.", "narrowcast.monitoring"))
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    assert f"{package} is not installed: run pip install 'narrowcast[serve]'" in refused("serve", MODEL)


class Letters:
    """A tokenizer of bytes."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("abc", (), ["a", "b", "c", ""]),
        ("a\N{SNOWMAN}b", (), ["a", "", "", "\N{SNOWMAN}", "b", ""]),
        ("abcd", ("bcx",), ["a", "", "", "bcd", ""]),
        ("abcd", ("bc",), ["a", "", "", "", ""]),
        ("aabb", ("abb", "b"), ["", "a", "a", "", ""]),
        ("ab", ("bc",), ["a", "", "b"]),
    ],
)
def test_text_is_said_once_it_is_settled(text: str, stop: tuple[str, ...], pieces: list[str]) -> None:
    growing = Text(Letters(), b"prompt", stop)
    said: list[str] = []
    for byte in text.encode():
        said.append("" if growing.stopped else growing.add(byte))
    assert [*said, growing.close()] == pieces


def test_a_part_of_a_character_is_shown_in_the_end() -> None:
    growing = Text(Letters(), b"", ())
    assert [growing.add(0xE2), growing.close()] == ["", "\N{REPLACEMENT CHARACTER}"]


def test_a_draw_is_among_the_likeliest_tokens() -> None:
    """Of probabilities 0.5, 0.3, 0.2, those of 0.6 together are the first two, in their proportion."""
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    chooser = Chooser(Request(prompt=(1,), max_new_tokens=1, top_p=0.6, seed=0))
    counts = torch.bincount(torch.tensor([chooser.choose(logits).id for _ in range(4000)]), minlength=3)
    assert counts[0] == 0
    assert abs(counts[1] / 4000 - 5 / 8) < 4 * (5 / 8 * 3 / 8 / 4000) ** 0.5  # four standard deviations


def test_scores_are_of_logits_before_temperature() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    (token,) = scored(logits, [0], 2)
    chosen = Chooser(Request(prompt=(1,), max_new_tokens=1, temperature=0.0, num_top=1)).choose(logits[0] * 1)
    assert token == Token(0, pytest.approx(-1.609, abs=1e-3), ((1, logits[0, 1].item()), (2, logits[0, 2].item())))
    assert chosen.id == 1


def test_places_are_counted() -> None:
    desk = Desk(max_running=1, max_waiting=1, max_len=8)
    request = Request(prompt=(1,), max_new_tokens=1)
    first, second = desk.hand_in([(request, print), (request, print)])
    with pytest.raises(FullError):
        desk.hand_in([(request, print)])
    place = desk.next()
    assert place is not None and place.name == first and desk.next() is None
    desk.withdraw([first, second])
    assert desk.withdrawn() == [first] and (desk.num_running, desk.num_waiting) == (0, 0)
    desk.close("over", within_s=0)
    with pytest.raises(ClosedError, match="over"):
        desk.hand_in([(request, print)])
