"""A server as a reward: POST {"prompts": [...], "completions": [...], columns...}, answer {"scores": [...]}."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

import requests
import torch
from torch import Tensor

from rlhf_fast.errors import RewardError

from .base import Prompt, Reward, RewardScores, checked_scores, describe_row
from .sources import default_name, split_url, without_secrets
from .worker import JobFailed, JobHung, Worker

CONNECT_TIMEOUT = 10.0
MAX_WAIT = 30.0  # between two attempts
ANSWER_LIMIT = 1 << 20  # bytes, and 1 KiB for each row


class HTTPReward(Reward):
    """Asks a server, batch_size rows a request, one request at a time.

    timeout (seconds; None: no limit) is for one call of score() with all its requests and attempts. A request gets at
    most half of the time that is left, so that one that is lost can be tried again. Connection errors, time-outs, 429
    and 5xx are tried again, `attempts` times in all, after backoff, 2 * backoff, 4 * backoff, ... seconds, or after
    what Retry-After says. Redirects are not followed: the prompts would go to another server. The environment's
    proxies and .netrc are honoured, credentials in the URL are sent as basic authentication; messages show neither them
    nor the query.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        timeout: float | None = 300.0,
        batch_size: int = 64,
        attempts: int = 6,
        backoff: float = 0.5,
    ) -> None:
        self.url, self.timeout = url, timeout
        self.batch_size, self.attempts, self.backoff = batch_size, attempts, backoff
        parts = split_url(url)
        self.shown_url = without_secrets(url)
        self.secrets = [secret for secret in (parts.query, parts.password) if secret]
        self.name = name or default_name(url)
        self.label = f"reward {self.shown_url}"
        self.session = requests.Session()
        self.worker = Worker()

    def _score(self, prompts: list[Prompt], completions: list[str], columns: dict[str, list[Any]]) -> RewardScores:
        # The worker keeps the limit where requests does not: name look-up, and an answer that comes byte by byte.
        self.progress = "it was not reached"
        limit = None if self.timeout is None else self.timeout + min(1.0, 0.1 * self.timeout)
        try:
            scores = self.worker.run(lambda: self._all(prompts, completions, columns), limit)
        except JobHung:
            self.session = requests.Session()  # the thread that hangs still uses the old one
            raise RewardError(f"{self.label} did not answer within {self.timeout:g} s ({self.progress}).") from None
        except JobFailed as failed:
            raise failed.error from None
        return RewardScores(scores, {self.name: scores})

    def _all(self, prompts: list[Prompt], completions: list[str], columns: dict[str, list[Any]]) -> Tensor:
        deadline = math.inf if self.timeout is None else time.monotonic() + self.timeout
        scores = []
        for start in range(0, len(completions), self.batch_size):
            rows = slice(start, start + self.batch_size)
            asked: dict[str, list[Any]] = {"prompts": prompts[rows], "completions": completions[rows]}
            body = self._encode(asked | {name: values[rows] for name, values in columns.items()}, start)
            answer = self._ask(body, len(completions[rows]), start, deadline)
            scores.append(checked_scores(self.label, answer, prompts[rows], completions[rows], first_row=start))
        return torch.cat(scores)

    def _encode(self, columns: dict[str, list[Any]], start: int) -> bytes:
        try:
            return json.dumps(columns, allow_nan=False).encode()
        except (TypeError, ValueError):
            for name, values in columns.items():
                for i, value in enumerate(values):
                    try:
                        json.dumps(value, allow_nan=False)
                    except (TypeError, ValueError) as error:
                        where = describe_row(i, columns["prompts"], columns["completions"], start)
                        raise RewardError(
                            f"{self.label}: column {name!r} cannot be sent at {where}: {error}."
                        ) from None
            raise

    def _ask(self, body: bytes, rows: int, start: int, deadline: float) -> Any:
        """The `scores` of one request, as they came."""
        problem = ""
        for attempt, wait in enumerate(self._waits(), start=1):
            self.progress = f"attempt {attempt}{problem and ' after: ' + problem}"
            try:
                return self._post(body, rows, deadline)
            except _TryAgainError as again:
                problem = str(again)
                wait = wait if again.after is None else again.after
            if attempt == self.attempts or time.monotonic() + wait >= deadline:
                break
            time.sleep(wait)
        tried = f"after {attempt} attempt{'s' if attempt > 1 else ''}"
        last = start + rows - 1
        raise RewardError(f"{self.label}: no scores for rows {start} to {last} {tried}: {problem}.")

    def _waits(self) -> Iterator[float]:
        for attempt in range(self.attempts):
            yield min(self.backoff * 2**attempt, MAX_WAIT)

    def _post(self, body: bytes, rows: int, deadline: float) -> Any:
        left = deadline - time.monotonic()
        read_timeout = None if math.isinf(left) else max(left / 2, 0.001)
        connect_timeout = CONNECT_TIMEOUT if read_timeout is None else min(CONNECT_TIMEOUT, read_timeout)
        try:
            with self.session.post(
                self.url,
                data=body,
                headers={"Content-Type": "application/json", "Accept": "application/json"},
                timeout=(connect_timeout, read_timeout),
                allow_redirects=False,
                stream=True,
            ) as response:
                content = self._read(response, ANSWER_LIMIT + 1024 * rows, deadline)
        except requests.ConnectTimeout:
            raise _TryAgainError(f"no connection within {connect_timeout:.3g} s") from None
        except requests.Timeout:
            raise _TryAgainError(f"no answer within {read_timeout:.3g} s") from None
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):
            raise RewardError(f"{self.label}: that is not a URL that can be asked.") from None
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise _TryAgainError(_reason(error)) from None
        except requests.RequestException as error:
            raise RewardError(f"{self.label}: {type(error).__name__}.") from None

        status = f"status {response.status_code} {response.reason or ''}".strip()
        if response.status_code == 429 or response.status_code >= 500:
            raise _TryAgainError(f"{status}{self._excerpt(content)}", _retry_after(response))
        if response.is_redirect:
            target = without_secrets(urljoin(self.url, response.headers["Location"]))
            raise RewardError(f"{self.label}: {status} to {target}: redirects are not followed; use that address.")
        if response.status_code != 200:
            raise RewardError(f"{self.label}: {status}{self._excerpt(content)}. It was not tried again.")
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            kind = response.headers.get("Content-Type", "no content type")
            raise RewardError(f"{self.label}: the answer is not JSON ({kind}){self._excerpt(content)}.") from None
        if not isinstance(answer, dict) or "scores" not in answer:
            raise RewardError(f'{self.label}: the answer is not {{"scores": [...]}}{self._excerpt(content)}.')
        return answer["scores"]

    def _read(self, response: requests.Response, limit: int, deadline: float) -> bytes:
        content = b""
        for chunk in response.iter_content(1 << 16):
            content += chunk
            if len(content) > limit:
                raise RewardError(f"{self.label}: the answer is longer than {limit:,} bytes.")
            if time.monotonic() > deadline:
                raise _TryAgainError("the time was up while the answer came in")
        return content

    def _excerpt(self, content: bytes) -> str:
        text = content[:4096].decode("utf-8", "replace").strip()
        for secret in self.secrets:
            text = text.replace(secret, "...")
        return f": {text[:200]!r}" if text else ""


class _TryAgainError(Exception):
    """What may work the next time; `after` seconds, if the server said so."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def _retry_after(response: requests.Response) -> float | None:
    """Seconds from a Retry-After header; None for none, or for a date."""
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _reason(error: BaseException) -> str:
    """The system's own words from inside requests' and urllib3's layers, whose text would repeat the whole URL."""
    seen: list[BaseException] = [error]
    for inner in seen:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror[0].lower() + inner.strerror[1:]
        found = [*inner.args, inner.__cause__, inner.__context__, getattr(inner, "reason", None)]
        seen += [one for one in found if isinstance(one, BaseException) and one not in seen]
    return "the connection broke"
