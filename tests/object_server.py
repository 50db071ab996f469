"""A server that speaks S3, in a process of its own, which counts, delays and fails. Holds no test.

    python object_server.py FOLDER DELAY FAILURES [RATE]

It writes its port to FOLDER/port, and to FOLDER/requests a line per request: method, key, status.
Each request waits DELAY seconds first; what is read leaves at RATE bytes a second in all, where it
is given. Of the requests for objects a share of FAILURES is
answered by 503, a dropped connection or half of the body, drawn at random; those of one key at most
twice in a row.
"""

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

folder, delay, failures = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
rate = float(sys.argv[4]) if len(sys.argv) > 4 else None
application = DomainDispatcherApplication(create_backend_app)
lock, rng, in_a_row = threading.Lock(), random.Random(0), Counter()
line_free = 0.0  # when the line to the clients is free
log = (folder / "requests").open("a", buffering=1)


class Handler(WSGIRequestHandler):
    """Keeps connections open, as object stores do."""

    protocol_version = "HTTP/1.1"

    def log_request(self, *_: Any) -> None:
        """Silent."""


class Dropped(Exception):  # noqa: N818
    """The connection ends here."""


def serve(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    time.sleep(delay)
    method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"]
    failure = None
    with lock:
        if key.count("/") > 1 and in_a_row[key] < 2 and rng.random() < failures:
            in_a_row[key] += 1
            failure = rng.choice(["503", "dropped", "half"])
        else:
            in_a_row[key] = 0
        log.write(f"{method} {key} {failure or 'ok'}\n")
    if failure == "503":
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("503 Slow Down", [("Content-Length", "0")])
        return [b""]
    if failure == "dropped":
        environ["werkzeug.socket"].close()
        raise Dropped
    answer = application(environ, start_response)
    if rate is not None and method == "GET":
        answer = slowly(answer)
    if failure == "half" and method == "GET":
        whole = b"".join(answer)
        return halved(environ, whole)
    return answer


def slowly(answer: Iterable[bytes]) -> Iterable[bytes]:
    """Pieces of an answer, each when all that is before it on the line has left."""
    global line_free
    for content in answer:
        for start in range(0, len(content), 2**18):
            piece = content[start : start + 2**18]
            with lock:
                line_free = max(line_free, time.monotonic()) + len(piece) / rate
                leaves = line_free
            time.sleep(max(0, leaves - time.monotonic()))
            yield piece


def halved(environ: dict[str, Any], whole: bytes) -> Iterable[bytes]:
    yield whole[: len(whole) // 2]
    environ["werkzeug.socket"].close()


server = make_server("127.0.0.1", 0, serve, threaded=True, request_handler=Handler)
(folder / "port.part").write_text(str(server.port))
(folder / "port.part").rename(folder / "port")
server.serve_forever()
