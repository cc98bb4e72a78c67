"""A loopback server that behaves like RunPod's REST API v2, as far as a deployment needs it.

Bodies are held to the fields, types and bounds that `api-reference-v2/openapi.json` of RunPod's
documentation gives (August 2026), and to the rules its prose adds. Every request is kept.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jsonschema import Draft202012Validator

KEY = "rpa_0123456789abcdefghij"
POOLS = {
    "ADA_24": {"NVIDIA GeForce RTX 4090"},
    "ADA_48_PRO": {"NVIDIA L40", "NVIDIA L40S", "NVIDIA RTX 6000 Ada Generation"},
    "AMPERE_80": {"NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"},
    "AMPERE_24": {"NVIDIA L4", "NVIDIA RTX A5000", "NVIDIA GeForce RTX 3090"},
}

TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT}
CUDA = {"type": "string", "pattern": r"^\d+\.\d+$"}


def whole(low: int, high: int = 1 << 31) -> dict[str, Any]:
    """Return the schema of a whole number."""
    return {"type": "integer", "minimum": low, "maximum": high}


def closed(fields: dict[str, Any], *required: str) -> dict[str, Any]:
    """Return the schema of an object with these fields and no others."""
    shape = {"type": "object", "additionalProperties": False, "required": list(required)}
    return {**shape, "properties": fields}


GPU = {
    "pools": {**TEXTS, "minItems": 1},
    "excludedTypes": {"type": "array", "uniqueItems": True, "items": TEXT},
    "count": whole(1),
    "allowedCudaVersions": {"type": "array", "items": CUDA},
    "minCudaVersion": CUDA,
}
SHARED = {
    "args": TEXT,
    "disk": whole(1),
    "env": {"type": "object", "additionalProperties": TEXT},
    "image": TEXT,
    "ports": TEXTS,
    "registry": {"type": ["string", "null"]},
    "name": {"type": "string", "minLength": 1},
    "dataCenterIds": TEXTS,
    "networkVolumes": TEXTS,
    "templateId": {"type": "string", "minLength": 1},
    "timeout": {"type": "integer"},
    "flashboot": {"enum": ["OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"]},
    "workers": closed({"min": whole(0), "max": whole(0), "idleTimeout": whole(1, 3600)}),
    "scaling": {
        "oneOf": [
            closed(
                {
                    "type": {"const": "QUEUE_DELAY"},
                    "queueDelay": {"type": "number", "minimum": 0.5},
                },
                "type", "queueDelay",
            ),
            closed(
                {"type": {"const": "REQUEST_COUNT"}, "requestCount": whole(1)},
                "type", "requestCount",
            ),
        ]
    },
}  # fmt: skip
KIND = {"type": {"enum": ["QUEUE", "LOAD_BALANCER"]}}
CREATE = closed({**SHARED, **KIND, "gpu": closed(GPU, "pools")}, "name", "type", "scaling")
UPDATE = closed({**SHARED, "gpu": closed(GPU)})


class Refusal(Exception):
    """A request that is answered with a problem."""

    def __init__(self, status: int, detail: str, errors: list[str] | None = None):
        super().__init__(detail)
        self.status = status
        self.body = {"title": "Refused", "status": status, "detail": detail}
        if errors:
            self.body["errors"] = errors


def check(body: Any, schema: dict[str, Any], there: dict[str, Any]) -> None:
    """Raise Refusal unless the body may be sent for an endpoint that is `there`."""
    faults = [e.message for e in Draft202012Validator(schema).iter_errors(body)]
    if faults:
        raise Refusal(422, "Request validation failed.", faults)
    if schema is CREATE and not {"image", "templateId"} & body.keys():
        raise Refusal(422, "Request validation failed.", ["image is missing"])
    gpu = {**there.get("gpu", {}), **body.get("gpu", {})}
    if not gpu:
        raise Refusal(400, "specify exactly one of gpu or cpu")
    if gpu.get("minCudaVersion") and gpu.get("allowedCudaVersions"):
        raise Refusal(400, "minCudaVersion and allowedCudaVersions are mutually exclusive")
    if unknown := set(gpu["pools"]) - POOLS.keys():
        raise Refusal(400, f"unknown pools: {sorted(unknown)}")
    types = set().union(*(POOLS[pool] for pool in gpu["pools"]))
    left_out = set(body.get("gpu", {}).get("excludedTypes", []))
    if left_out and "pools" not in body["gpu"]:
        raise Refusal(422, "excludedTypes requires pools")
    if left_out - types or left_out == types:
        raise Refusal(400, "excludedTypes must leave some of the pools' types, and name no others")
    scaling = {**there, **body}["scaling"]["type"]
    if scaling == "REQUEST_COUNT" and "idleTimeout" in body.get("workers", {}):
        raise Refusal(400, "idleTimeout does not go with REQUEST_COUNT")


class RestApi(ThreadingHTTPServer):
    """The API, with its endpoints in `endpoints` and what was asked in `requests`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, Any]] = []  # method, path, body
        self.heads: list[dict[str, str]] = []
        self.faults: list[tuple[str, str]] = []  # method, and what happens to the next such one
        self.max_workers = 10  # of the account

    @property
    def url(self) -> str:
        """Return the address to give as RUNPOD_REST_URL."""
        return f"http://127.0.0.1:{self.server_port}/v2"

    def __enter__(self) -> RestApi:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    def changes(self) -> list[tuple[str, str, Any]]:
        """Return the requests that were meant to change something."""
        return [request for request in self.requests if request[0] != "GET"]

    def add(self, name: str, **fields: Any) -> str:
        """Put an endpoint there, as somebody else may have; return its id."""
        ident = f"ep{len(self.endpoints)}{len(self.requests)}x"
        usual = {
            "type": "QUEUE", "image": "someone/else:1", "env": {},
            "gpu": {"pools": ["ADA_24"], "count": 1, "allowedCudaVersions": ["12.4"]},
            "workers": {"min": 0, "max": 1}, "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
        }  # fmt: skip
        self.endpoints[ident] = {"id": ident, "name": name, **usual, **fields}
        return ident

    def do(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Carry a request out; raise Refusal."""
        if method == "GET" and path == "/v2/serverless":
            return 200, {"endpoints": list(self.endpoints.values())}
        if method == "POST" and path == "/v2/serverless":
            check(body, CREATE, {})
            if body["workers"]["max"] > self.max_workers:
                raise Refusal(400, f"Max workers across all endpoints is {self.max_workers}")
            return 201, self.endpoints[self.add(**body)]
        found = re.fullmatch(r"/v2/serverless/([\w-]+)", path)
        there = self.endpoints.get(found[1]) if found else None
        if there is None:
            raise Refusal(404, "resource not found")
        if method == "PATCH":
            check(body, UPDATE, there)
            gpu = {**there.get("gpu", {}), **body.pop("gpu", {})}
            there.update({**body, "gpu": gpu})  # so `env` is replaced whole
        if method == "DELETE":
            del self.endpoints[found[1]]
            return 204, None
        return 200, there


class _Requests(BaseHTTPRequestHandler):
    server: RestApi
    timeout = 10

    def answer(self) -> None:
        """Answer one request, or fail as `faults` says."""
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(data) if data else None
        self.server.requests.append((self.command, self.path, json.loads(data) if data else None))
        self.server.heads.append(dict(self.headers))
        fault = next((how for method, how in self.server.faults if method == self.command), "")
        if fault:
            self.server.faults.remove((self.command, fault))
        try:
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                raise Refusal(401, "missing bearer token")
            if fault.isdigit():
                raise Refusal(int(fault), f"something went wrong with {(body or {}).get('env')}")
            status, told = self.server.do(self.command, self.path, body)
        except Refusal as refusal:
            status, told = refusal.status, refusal.body
        if fault == "lost":  # carried out, but nobody hears of it
            self.close_connection = True
            return
        text = b"" if told is None else json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        if status == 429:
            self.send_header("Retry-After", "2")
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = do_DELETE = answer

    def log_message(self, *args: Any) -> None:
        """Say nothing."""
