"""A server as a reward, against a real one on a free port."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf_fast.errors import RewardError
from rlhf_fast.rewards import HTTPReward, load_reward

PROMPTS = [f"prompt {i}" for i in range(5)]
COMPLETIONS = ["a", "bb", "你好吗", "\ud800 lone", "eeeee"]
LENGTHS = [1.0, 2.0, 3.0, 6.0, 5.0]


class Server(ThreadingHTTPServer):
    """Answers the n-th request by the n-th of `answers` (the last one from then on) and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Callable[[Handler, dict[str, Any]], None]] = [Handler.lengths]
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.stop = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"

    def handle_error(self, *_: Any) -> None:
        """Clients that go away in the middle of an answer are part of these tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.headers.append(self.headers)
        answers = self.server.answers
        answers[min(len(self.server.asked), len(answers)) - 1](self, body)

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def lengths(self, body: dict[str, Any]) -> None:
        self.send(200, json.dumps({"scores": [len(c) for c in body["completions"]]}).encode())

    def log_message(self, *_: Any) -> None:
        pass


def says(status: int, content: str, **headers: str) -> Callable[[Handler, dict[str, Any]], None]:
    return lambda handler, body: handler.send(status, content.encode(), **headers)


def hangs(handler: Handler, body: dict[str, Any]) -> None:
    handler.server.stop.wait(60)


def drips(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.stop.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def hangs_up(handler: Handler, body: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server: Server, url: str | None = None, timeout: float | None = 30, **options: Any) -> list[float]:
    reward = HTTPReward(url or server.url, timeout=timeout, backoff=0.01, **options)
    return reward.score(PROMPTS, COMPLETIONS, answer=[1, 2, 3, 4, 5]).total.tolist()


def test_batches_with_columns(server: Server) -> None:
    assert ask(server, batch_size=2, timeout=None) == LENGTHS
    assert server.asked == [
        {"prompts": PROMPTS[0:2], "completions": COMPLETIONS[0:2], "answer": [1, 2]},
        {"prompts": PROMPTS[2:4], "completions": COMPLETIONS[2:4], "answer": [3, 4]},
        {"prompts": PROMPTS[4:5], "completions": COMPLETIONS[4:5], "answer": [5]},
    ]


def test_conversations_are_sent_as_they_are(server: Server) -> None:
    prompts: list[Any] = [[{"role": "user", "content": "嗨"}]]
    load_reward(server.url).score(prompts, ["x"])
    assert server.asked[0]["prompts"] == prompts


def test_credentials_and_query_reach_the_server_alone(server: Server) -> None:
    url = server.url.replace("http://", "http://me:pa55word@") + "?key=s3cret"
    assert ask(server, url) == LENGTHS
    assert server.headers[0]["Authorization"] == "Basic " + base64.b64encode(b"me:pa55word").decode()
    server.answers = [says(403, "key=s3cret is not allowed, pa55word neither")]
    with pytest.raises(RewardError) as caught:
        ask(server, url)
    text = "".join(map(str, (caught.value, caught.value.__cause__)))
    assert "s3cret" not in text
    assert "pa55word" not in text
    assert f"reward {server.url}: status 403 Forbidden: '... is not allowed, ... neither'" in text


@pytest.mark.parametrize(
    "trouble",
    [says(500, ""), says(503, "busy"), says(429, "", Retry_After="0"), says(502, "", Retry_After="soon"), hangs_up],
)
def test_trouble_that_passes_is_waited_out(server: Server, trouble: Any) -> None:
    server.answers = [trouble, trouble, Handler.lengths]
    assert ask(server) == LENGTHS
    assert len(server.asked) == 3


def test_a_request_that_is_lost_is_sent_again(server: Server) -> None:
    server.answers = [hangs, Handler.lengths]
    assert ask(server, timeout=2) == LENGTHS
    assert len(server.asked) == 2


FAILURES = [
    (says(400, "no such model"), 1, r"status 400 Bad Request: 'no such model'\. It was not tried again"),
    (says(404, "<html>"), 1, r"status 404 Not Found: '<html>'"),
    (says(500, "boom"), 3, r"no scores for rows 0 to 4 after 3 attempts: status 500 Internal Server Error: 'boom'"),
    (says(429, "", Retry_After="999"), 1, r"after 1 attempt: status 429 Too Many Requests"),
    (hangs_up, 3, r"after 3 attempts: the connection broke"),
    (
        says(302, "", Location="/v2?key=1"),
        1,
        r"status 302 Found to http://127.*:\d+/v2: redirects are not followed",
    ),
    (says(204, ""), 1, r"status 204 No Content"),
    (says(200, ""), 1, r"the answer is not JSON \(application/json\)\."),
    (says(200, "<!DOCTYPE html>", Content_Type="text/html"), 1, r"not JSON \(.*text/html\): '<!DOCTYPE html>'"),
    (says(200, '{"scores": [1, 2'), 1, r"the answer is not JSON"),
    (says(200, "[" * 100_000), 1, r"the answer is not JSON"),
    (says(200, "[1, 2, 3, 4, 5]"), 1, r"the answer is not \{\"scores\": \[\.\.\.\]\}: '\[1, 2, 3, 4, 5\]'"),
    (says(200, '{"score": 1}'), 1, r"the answer is not \{\"scores\""),
    (says(200, '{"scores": null}'), 1, r"returned None"),
    (says(200, '{"scores": "12345"}'), 1, r"returned '12345' \(a str\), not a list"),
    (says(200, '{"scores": [1, 2, 3, 4]}'), 1, r"returned 4 scores for 5 completions: none at row 4"),
    (says(200, '{"scores": [1, 2, NaN, 4, 5]}'), 1, r"returned nan at row 2 \(prompt 'prompt 2', completion '你好吗'"),
    (says(200, '{"scores": [1, 2, 3, 1e999, 5]}'), 1, r"returned inf at row 3"),
    (says(200, '{"scores": [1, null, 3, 4, 5]}'), 1, r"returned None .* at row 1"),
    (says(200, '{"scores": [1, "2", 3, 4, 5]}'), 1, r"returned '2' \(a str\) at row 1"),
    (says(200, " " * 1_100_000), 1, r"the answer is longer than 1,053,696 bytes"),
]


@pytest.mark.parametrize(("answer", "requests", "message"), FAILURES)
def test_failures_name_url_attempts_and_reason(server: Server, answer: Any, requests: int, message: str) -> None:
    server.answers = [answer]
    with pytest.raises(RewardError, match=r"reward http://127\.0\.0\.1:\d+/score.*" + message):
        ask(server, attempts=3)
    assert len(server.asked) == requests


def test_rows_of_a_later_batch_keep_their_number(server: Server) -> None:
    server.answers = [Handler.lengths, Handler.lengths, says(500, "")]
    with pytest.raises(RewardError, match="no scores for rows 4 to 4 after 2 attempts"):
        ask(server, batch_size=2, attempts=2)
    server.asked.clear()
    server.answers = [Handler.lengths, says(200, '{"scores": [1, null]}')]
    with pytest.raises(RewardError, match="at row 3"):
        ask(server, batch_size=2)


@pytest.mark.parametrize("answer", [hangs, drips])
def test_the_time_limit_holds_whatever_the_server_does(server: Server, answer: Any) -> None:
    server.answers = [answer]
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"did not answer within 0\.4 s|after \d attempts?: no answer within"):
        ask(server, timeout=0.4)
    assert time.monotonic() - start < 10
    server.answers = [Handler.lengths]
    assert ask(server) == LENGTHS


def test_nobody_listens() -> None:
    with socket.socket() as taken:  # bound, never listening: nobody else gets this port meanwhile
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/score"
        with pytest.raises(RewardError, match=rf"reward {url}: no scores .* after 3 attempts: connection refused\."):
            HTTPReward(url, attempts=3, backoff=0.01).score(["p"], ["c"])


def test_no_such_host() -> None:
    with pytest.raises(RewardError, match=r"reward http://no-such-host\.invalid/: no scores .* after 1 attempt: \w"):
        HTTPReward("http://no-such-host.invalid/?key=secret", attempts=1).score(["p"], ["c"])


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}])
def test_columns_that_json_cannot_carry(server: Server, value: Any) -> None:
    with pytest.raises(RewardError, match=r"column 'answer' cannot be sent at row 1 \(prompt 'q', completion 'd'\): "):
        HTTPReward(server.url).score(["p", "q"], ["c", "d"], answer=[1, value])
    assert not server.asked
