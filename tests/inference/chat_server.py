"""A local endpoint of chat completions that misbehaves as it is told to."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


class ChatServer:
    """Answers `answer(body)` after the misbehaviours in `plan`, one a request, are used up.

    Attributes:
      bodies: of all requests, in order. headers: theirs. most: requests that were under way at a time.
    """

    def __init__(self, answer: Callable[[Body], str], plan: tuple[str, ...] = (), seconds: float = 0.0):
        self.answer, self.plan, self.seconds = answer, list(plan), seconds
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most = self._now = 0
        self.lock = threading.Lock()
        self.url = ""

    def begin(self, body: Body, headers: dict[str, str]) -> str:
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self._now += 1
            self.most = max(self.most, self._now)
            return self.plan.pop(0) if self.plan else ""

    def end(self) -> None:
        with self.lock:
            self._now -= 1


def completion(text: str, prompt: int = 11, completion: int = 7) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}).encode()


@contextlib.contextmanager
def serving(server: ChatServer) -> Iterator[ChatServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            trouble = server.begin(body, dict(self.headers))
            try:
                self.close_connection = True
                misbehave(self, trouble, server, body)
            except OSError:  # the client has gone
                pass
            finally:
                server.end()

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def misbehave(handler: BaseHTTPRequestHandler, trouble: str, server: ChatServer, body: Body) -> None:
    """Sends what `trouble` says, as "429 0.3" (with Retry-After), "500", "hang up", "garbage"; "" is a good answer."""
    kind, _, rest = trouble.partition(" ")
    data = completion(server.answer(body))
    if kind.isdigit():
        data = rest.encode() if rest.startswith("{") else json.dumps({"error": {"message": f"told {rest}"}}).encode()
        handler.send_response(int(kind))
        if kind == "429":
            handler.send_header("Retry-After", rest)
        if kind == "302":
            handler.send_header("Location", rest)
    else:
        time.sleep(float(rest) if kind == "slow" else server.seconds)
        handler.send_response(200)
    if trouble == "garbage":
        data = b"<html>Bad gateway</html>"
    if trouble == "no choices":
        data = b'{"choices": []}'
    if trouble == "too long":
        data = b" " * (9 << 20)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    if trouble == "hang up":
        handler.wfile.write(data[: len(data) // 2])
        return
    if trouble == "drip":
        for place in range(len(data)):
            handler.wfile.write(data[place : place + 1])
            time.sleep(0.05)
        return
    handler.wfile.write(data)
