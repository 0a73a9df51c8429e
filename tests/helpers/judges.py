"""A judge behind HTTP for tests: a server on the loopback address that answers as it is told."""

import json
import threading
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# body of a request -> what is answered: JSON, bytes, or (status, headers, JSON or bytes)
Answer = Callable[[dict], object]


class JudgeServer:
    """Answers POST requests by `answer`, but the next ones by the entries of `first`, one after another."""

    def __init__(self) -> None:
        self.answer: Answer = rewards
        self.first: list[Answer] = []
        self.bodies: list[dict] = []
        self.paths: list[str] = []
        self.headers: list[dict] = []
        self.at_once = self.most = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body go in one packet; two would wait for each other

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, headers, content = server._answered(self.path, dict(self.headers), body)
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *words: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def _answered(self, path: str, headers: dict, body: dict) -> tuple[int, dict, bytes]:
        with self._lock:
            self.paths.append(path)
            self.headers.append({name.lower(): value for name, value in headers.items()})
            self.bodies.append(body)
            answer = self.first.pop(0) if self.first else self.answer
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        try:
            found = answer(body)
        finally:
            with self._lock:
                self.at_once -= 1
        status, more, content = found if isinstance(found, tuple) else (200, {}, found)
        return status, more, content if isinstance(content, bytes) else json.dumps(content).encode()

    @property
    def queries(self) -> list[str]:
        """All texts that reward requests have asked for."""
        return [query for body in self.bodies for query in body["query"]]

    def forget(self) -> None:
        """Begins again, for the next test."""
        self.__dict__.update(answer=rewards, first=[], bodies=[], paths=[], headers=[], at_once=0, most=0)

    def close(self) -> None:
        """Ends the server."""
        self._http.shutdown()
        self._http.server_close()


def reward(query: str) -> float:
    """The score of a text: any number that hardly another text has."""
    return zlib.crc32(query.encode()) / 2**32


def rewards(body: dict) -> dict:
    """Answers as a reward server does."""
    return {"rewards": [reward(query) for query in body["query"]]}


def away(body: dict) -> tuple:
    """Answers as a server does that is starting."""
    return 503, {}, {"detail": "loading"}


def says(text: str, tokens: list[tuple[str, dict[str, float]]] | None = None, end: str = "stop") -> dict:
    """Writes a chat completion; tokens: what was generated, each with log-probs of the likeliest there."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": end, "logprobs": None}
    if tokens is not None:
        top = [
            {"token": token, "top_logprobs": [{"token": t, "logprob": x} for t, x in likely.items()]}
            for token, likely in tokens
        ]
        choice["logprobs"] = {"content": top}
    return {"choices": [choice]}
