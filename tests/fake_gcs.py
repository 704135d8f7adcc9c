"""A server that speaks as much of the JSON API of Google Cloud Storage as gcsfs, tensorstore and
orbax ask for, with faults on request.

Objects live in memory, each with a generation, and `ifGenerationMatch` is honoured under one lock:
exclusive creation is as exclusive as that of the real service. `python tests/fake_gcs.py
--port 9000` serves until it is stopped; clients find it by STORAGE_EMULATOR_HOST (gcsfs) and
TENSORSTORE_GCS_HTTP_URL (tensorstore).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import itertools
import json
import random
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 1000  # names a listing


class Store:
    """Buckets of objects, and the faults to be thrown into the way to them."""

    def __init__(self):
        self.lock = threading.RLock()
        self.objects: dict[tuple[str, str], dict] = {}
        self.uploads: dict[str, dict] = {}
        self.fault_rate = 0.0  # share of the requests that fail, half of them by a reset connection
        self.forbidden = ""  # a regular expression of "METHOD path": these requests are refused
        self.refusal = 503
        self.requests: list[str] = []
        self._random, self._numbers = random.Random(0), itertools.count(1)

    def fault(self, request: str) -> str | None:
        """A status or `reset` where this request is to fail."""
        with self.lock:
            self.requests.append(request)
            if self.forbidden and re.search(self.forbidden, request):
                return str(self.refusal)
            if self._random.random() >= self.fault_rate:
                return None
            return self._random.choice(["503", "reset"])

    def put(self, bucket: str, name: str, data: bytes, query: dict) -> dict | None:
        """The new object, or None where the precondition does not hold."""
        with self.lock:
            found = self.objects.get((bucket, name))
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != (found["generation"] if found else 0):
                return None
            made = {
                "data": data,
                "generation": time.time_ns() // 1000 * 1000 + next(self._numbers) % 1000,
                "time": time.time(),
            }
            self.objects[bucket, name] = made
            return described(bucket, name, made)

    def names(self, bucket: str = "bucket") -> list[str]:
        """What the bucket holds."""
        with self.lock:
            return sorted(name for found, name in self.objects if found == bucket)


def described(bucket: str, name: str, found: dict) -> dict:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found["time"]))
    digest = base64.b64encode(hashlib.md5(found["data"]).digest()).decode()
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(found["data"])),
        "md5Hash": digest,
        "generation": str(found["generation"]),
        "metageneration": "1",
        "etag": str(found["generation"]),
        "storageClass": "STANDARD",
        "timeCreated": stamp,
        "updated": stamp,
        "contentType": "application/octet-stream",
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body would wait 40 ms for the acknowledgement of its headers
    store: Store

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes | dict = b"", headers: dict | None = None):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str):
        self.answer(status, {"error": {"code": status, "message": message}})

    def serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        split = urlsplit(self.path)
        query = {
            name: values[-1]
            for name, values in parse_qs(split.query, keep_blank_values=True).items()
        }
        fault = self.store.fault(f"{self.command} {unquote(self.path)}")
        if (
            fault == "reset"
        ):  # the request has come, the answer never goes: the client cannot know which
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if self._random_half():
                self.route(split.path, query, body, is_silent=True)
            self.close_connection = True
            self.connection.close()
            return
        if fault:
            self.refuse(int(fault), "injected")
            return
        self.route(split.path, query, body)

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the client hung up, or was killed
            super().handle()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = serve

    def _random_half(self) -> bool:
        with self.store.lock:
            return self.store._random.random() < 0.5

    def route(self, path: str, query: dict, body: bytes, is_silent: bool = False):
        if is_silent:
            self.answer = self.refuse = lambda *_, **__: None
        if found := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
            self.upload(found[1], query, body)
        elif found := re.fullmatch(r"/resume/([^/]+)", path):
            self.resume(found[1], body)
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            self.listing(found[1], query)
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", path):
            self.move(found[1], unquote(found[2]), unquote(found[3]))
        elif found := re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)/o/(.+)", path):
            self.single(found[1], unquote(found[2]), query)
        elif found := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            self.answer(
                200,
                {
                    "kind": "storage#bucket",
                    "name": found[1],
                    "location": "US",
                    "storageClass": "STANDARD",
                },
            )
        else:
            self.refuse(404, f"no such address: {path}")

    def store_object(self, bucket: str, name: str, data: bytes, query: dict):
        made = self.store.put(bucket, name, data, query)
        self.answer(200, made) if made else self.refuse(412, "conditionNotMet")

    def upload(self, bucket: str, query: dict, body: bytes):
        kind = query.get("uploadType", "media")
        if kind == "media":
            self.store_object(bucket, query["name"], body, query)
        elif kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            end = b"\r\n" if body.partition(b"\n")[0].endswith(b"\r") else b"\n"
            about, content = (
                part.split(end * 2, 1)[1] for part in body.split(b"--" + boundary)[1:3]
            )
            self.store_object(
                bucket,
                query.get("name") or json.loads(about)["name"],
                content.removesuffix(end),
                query,
            )
        else:
            key = f"u{random.getrandbits(64):x}"
            name = query.get("name") or json.loads(body)["name"]
            with self.store.lock:
                self.store.uploads[key] = {
                    "bucket": bucket,
                    "name": name,
                    "query": query,
                    "data": b"",
                }
            self.answer(200, headers={"Location": f"http://{self.headers['Host']}/resume/{key}"})

    def resume(self, key: str, body: bytes):
        upload = self.store.uploads[key]
        first, total = re.fullmatch(
            r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"]
        ).groups()
        if first is not None:
            upload["data"] = upload["data"][: int(first)] + body
        if total != "*" and len(upload["data"]) == int(total):
            self.store_object(upload["bucket"], upload["name"], upload["data"], upload["query"])
        else:
            self.answer(
                308,
                headers={"Range": f"bytes=0-{len(upload['data']) - 1}"} if upload["data"] else {},
            )

    def listing(self, bucket: str, query: dict):
        prefix = query.get("prefix", "")
        delimiter = query.get("delimiter", "")
        after = query.get("pageToken", "")
        with self.store.lock:
            found = sorted(
                (name, thing)
                for (where, name), thing in self.store.objects.items()
                if where == bucket
            )
        items, prefixes, last = [], [], ""
        for name, thing in found:
            is_wanted = (
                name.startswith(prefix) and name > after and name >= query.get("startOffset", "")
            )
            if not is_wanted or (query.get("endOffset") and name >= query["endOffset"]):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                group = prefix + rest.split(delimiter, 1)[0] + delimiter
                if group not in prefixes and not after.startswith(group):
                    prefixes.append(group)
            else:
                items.append(described(bucket, name, thing))
            if len(items) + len(prefixes) == min(int(query.get("maxResults", PAGE)), PAGE):
                last = name
                break
        self.answer(
            200,
            {"kind": "storage#objects", "items": items, "prefixes": prefixes}
            | ({"nextPageToken": last} if last else {}),
        )

    def move(self, bucket: str, name: str, other: str):
        with self.store.lock:
            if found := self.store.objects.pop((bucket, name), None):
                self.store_object(bucket, other, found["data"], {})
            else:
                self.refuse(404, f"no such object: {bucket}/{name}")

    def single(self, bucket: str, name: str, query: dict):
        with self.store.lock:
            found = self.store.objects.get((bucket, name))
            generation = found["generation"] if found else 0
            if (
                self.command == "DELETE"
                and found
                and query.get("ifGenerationMatch") in (None, str(generation))
            ):
                del self.store.objects[bucket, name]
                self.answer(204)
                return
        if query.get("ifGenerationMatch") not in (None, str(generation)):
            self.refuse(412, "conditionNotMet")
        elif found is None or query.get("generation") not in (None, str(generation)):
            self.refuse(404, f"no such object: {bucket}/{name}")
        elif query.get("ifGenerationNotMatch") == str(generation):
            self.answer(304)
        elif query.get("alt") == "media":
            self.content(found)
        else:
            self.answer(200, described(bucket, name, found))

    def content(self, found: dict):
        data, status = found["data"], 200
        headers = {
            "X-Goog-Generation": str(found["generation"]),
            "Content-Type": "application/octet-stream",
        }
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size = len(data)
            first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
            last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
            if first >= size:
                self.refuse(416, "range")
                return
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.answer(status, data, headers)


class FakeGcs:
    """The server, as a context; `store` is what it holds."""

    def __init__(self, port: int = 0):
        self.store = Store()
        handler = type("Handler", (Handler,), {"store": self.store})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes clients talk to it."""
        quiet = {
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GS_TOKEN": "anon",
            "FSSPEC_GCS_TOKEN": "anon",
        }
        return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url, **quiet}

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--fault-rate", type=float, default=0.0)
    asked = parser.parse_args()
    with FakeGcs(asked.port) as server:
        server.store.fault_rate = asked.fault_rate
        print(" ".join(f"{name}={value}" for name, value in server.environment.items()), flush=True)
        threading.Event().wait()
