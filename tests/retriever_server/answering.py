"""A small real server that answers by functions and records what it was asked."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data.records import Hit, Passage
from retriever_server.client.wire import render_hits


class Answering(ThreadingHTTPServer):
    """Answers (method, path) by a function of the body, and records what came."""

    daemon_threads = True

    def __init__(self, routes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes, self.seen = routes, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.seen]


class Handler(BaseHTTPRequestHandler):
    def answer(self) -> None:
        server: Answering = self.server  # type: ignore[assignment]
        sent = self.rfile.read(int(self.headers.get("content-length") or 0)) or b"null"
        lines = [json.loads(line) for line in sent.splitlines()]
        body = lines if "ndjson" in self.headers.get("content-type", "") else lines[0]
        server.seen.append((self.path, body, {name.lower(): value for name, value in self.headers.items()}))
        route = server.routes.get(self.path)
        status, content = (404, {}) if route is None else route(body)
        sent = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_POST = answer

    def log_message(self, format, *args) -> None:
        pass


@contextmanager
def answering(**routes):
    server = Answering({f"/{path.replace('__', '/')}": route for path, route in routes.items()})
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def echo(generation: str):
    """Finds one passage a query: the query."""

    def retrieve(body):
        rankings = [
            [Hit(Passage(q, f"about {q}", q), 0.5, generation)][: body["topk"]] for q in body["queries"]
        ]
        return 200, render_hits(rankings, generation, body["return_scores"])

    return retrieve
