"""What `show` fetches of a run in a bucket, and how long it takes (target: at most 2 MB and 1 s on loopback).

The server is moto's, in a process of its own. Each neuron is shown twice in a process of its own, with an empty cache
folder and with what that left.

    python -m benches.remote RUN [--neurons 3]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MOST_BYTES, MOST_SECONDS = 2_000_000, 1.0


def serve() -> None:
    """Print the port, and for each line that comes in the bytes that were sent since the last one."""
    import threading

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    inner, sent = DomainDispatcherApplication(create_backend_app), [0, 0]

    def wire(environ, start_response):  # type: ignore[no-untyped-def]
        body = b"".join(inner(environ, start_response))
        sent[0] += len(body)
        sent[1] += 1
        return [body]

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            pass

    server = make_server("127.0.0.1", 0, wire, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    for _ in sys.stdin:
        print(json.dumps(sent), flush=True)
        sent[:] = [0, 0]


SHOW = """
import sys, time, json
import mnemoscope as mn, fsspec, s3fs, pyarrow.dataset
begin = time.perf_counter()
card = mn.open_run(sys.argv[1]).neuron(sys.argv[2], examples=10)
print(json.dumps([time.perf_counter() - begin, card.previous is not None]))
"""


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?")
    parser.add_argument("--neurons", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    from mnemoscope import open_run, push

    command = [sys.executable, "-m", "benches.remote", "--serve"]
    with (
        tempfile.TemporaryDirectory() as cache,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout and server.stdin
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
            "MNEMOSCOPE_CACHE": cache,
        }

        def sent() -> list[int]:
            assert server.stdout and server.stdin
            print(file=server.stdin, flush=True)
            counts: list[int] = json.loads(server.stdout.readline())
            return counts

        import fsspec

        fsspec.filesystem("s3").mkdir("bucket")
        begin = time.perf_counter()
        url = str(push(given.run, "s3://bucket/run").path)
        pushed = time.perf_counter() - begin
        model = open_run(given.run).manifest.model
        rows, drawn = [], random.Random(0)
        for _ in range(given.neurons):
            layer = drawn.choice(model.cells.layers)
            address = f"L{layer}N{drawn.randrange(model.sizes[layer])}"
            for kept in (False, True):
                sent()
                done = subprocess.run(
                    [sys.executable, "-c", SHOW, url, address], check=True, stdout=subprocess.PIPE, text=True
                )
                count, requests = sent()
                rows.append(
                    {
                        "neuron": address,
                        "kept": kept,
                        "bytes": count,
                        "requests": requests,
                        "seconds": round(json.loads(done.stdout)[0], 3),
                    }
                )
            for entry in (Path(cache) / "parts").iterdir():
                for file in entry.iterdir():
                    file.unlink()
        server.stdin.close()
    first = [row for row in rows if not row["kept"]]
    print(
        json.dumps(
            {
                "bench": "remote",
                "run_bytes": sum(entry.bytes for entry in open_run(given.run).manifest.tables.values()),
                "push_seconds": round(pushed, 1),
                "shown": rows,
                "within_target": all(
                    row["bytes"] <= MOST_BYTES and row["seconds"] <= MOST_SECONDS for row in first
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
