"""A stand-in for RunPod's REST API v2 on loopback, as far as a deployment needs it.

It checks bodies against the fields, types and bounds of `api-reference-v2/openapi.json` in RunPod's
documentation (August 2026), and against the rules that its prose adds. It records every request.
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
    """Make the schema of a whole number."""
    return {"type": "integer", "minimum": low, "maximum": high}


def closed(fields: dict[str, Any], *required: str) -> dict[str, Any]:
    """Make the schema of an object with these fields and no others."""
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
    """A request is answered with an error."""

    def __init__(self, status: int, detail: str, errors: list[str] | None = None):
        super().__init__(detail)
        self.status = status
        self.body = {"title": "Refused", "status": status, "detail": detail}
        if errors:
            self.body["errors"] = errors


def check(body: Any, schema: dict[str, Any], endpoint: dict[str, Any]) -> None:
    """Check the body of a request for an endpoint, {} for a new one; raise Refusal."""
    problems = [e.message for e in Draft202012Validator(schema).iter_errors(body)]
    if problems:
        raise Refusal(422, "Request validation failed.", problems)
    if schema is CREATE and not {"image", "templateId"} & body.keys():
        raise Refusal(422, "Request validation failed.", ["image is missing"])
    gpu = {**endpoint.get("gpu", {}), **body.get("gpu", {})}
    if not gpu:
        raise Refusal(400, "specify exactly one of gpu or cpu")
    if gpu.get("minCudaVersion") and gpu.get("allowedCudaVersions"):
        raise Refusal(400, "minCudaVersion and allowedCudaVersions are mutually exclusive")
    if unknown := set(gpu["pools"]) - POOLS.keys():
        raise Refusal(400, f"unknown pools: {sorted(unknown)}")
    types = set().union(*(POOLS[pool] for pool in gpu["pools"]))
    excluded = set(body.get("gpu", {}).get("excludedTypes", []))
    if excluded and "pools" not in body["gpu"]:
        raise Refusal(422, "excludedTypes requires pools")
    if excluded - types or excluded == types:
        raise Refusal(400, "excludedTypes must leave some of the pools' types, and name no others")
    scaling = {**endpoint, **body}["scaling"]["type"]
    if scaling == "REQUEST_COUNT" and "idleTimeout" in body.get("workers", {}):
        raise Refusal(400, "idleTimeout does not go with REQUEST_COUNT")


class RestApi(ThreadingHTTPServer):
    """The API; `endpoints` has its endpoints and `requests` all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, Any]] = []  # method, path, body
        self.headers: list[dict[str, str]] = []
        self.faults: list[tuple[str, str]] = []  # method, and what happens to its next request
        self.max_workers = 10  # of the account

    @property
    def url(self) -> str:
        """The value of RUNPOD_REST_URL."""
        return f"http://127.0.0.1:{self.server_port}/v2"

    def __enter__(self) -> RestApi:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    def changes(self) -> list[tuple[str, str, Any]]:
        """List the requests that would change something."""
        return [request for request in self.requests if request[0] != "GET"]

    def add(self, name: str, **fields: Any) -> str:
        """Add an endpoint, as if it had been made in the console; return its id."""
        ident = f"ep{len(self.endpoints)}{len(self.requests)}x"
        defaults = {
            "type": "QUEUE", "image": "someone/else:1", "env": {},
            "gpu": {"pools": ["ADA_24"], "count": 1, "allowedCudaVersions": ["12.4"]},
            "workers": {"min": 0, "max": 1}, "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
        }  # fmt: skip
        self.endpoints[ident] = {"id": ident, "name": name, **defaults, **fields}
        return ident

    def do(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Carry out a request; return status and body; raise Refusal."""
        if method == "GET" and path == "/v2/serverless":
            return 200, {"endpoints": list(self.endpoints.values())}
        if method == "POST" and path == "/v2/serverless":
            check(body, CREATE, {})
            if body["workers"]["max"] > self.max_workers:
                raise Refusal(400, f"Max workers across all endpoints is {self.max_workers}")
            return 201, self.endpoints[self.add(**body)]
        match = re.fullmatch(r"/v2/serverless/([\w-]+)", path)
        endpoint = self.endpoints.get(match[1]) if match else None
        if endpoint is None:
            raise Refusal(404, "resource not found")
        if method == "PATCH":
            check(body, UPDATE, endpoint)
            gpu = {**endpoint.get("gpu", {}), **body.pop("gpu", {})}
            endpoint.update({**body, "gpu": gpu})  # `env` is replaced as a whole
        if method == "DELETE":
            del self.endpoints[match[1]]
            return 204, None
        return 200, endpoint


class _Requests(BaseHTTPRequestHandler):
    server: RestApi
    timeout = 10

    def answer(self) -> None:
        """Answer one request, with the next fault of its method if there is one."""
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(data) if data else None
        self.server.requests.append((self.command, self.path, json.loads(data) if data else None))
        self.server.headers.append(dict(self.headers))
        faults = (fault for method, fault in self.server.faults if method == self.command)
        fault = next(faults, "")
        if fault:
            self.server.faults.remove((self.command, fault))
        try:
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                raise Refusal(401, "missing bearer token")
            if fault.isdigit():
                raise Refusal(int(fault), f"something went wrong with {(body or {}).get('env')}")
            status, reply = self.server.do(self.command, self.path, body)
        except Refusal as refusal:
            status, reply = refusal.status, refusal.body
        if fault == "lost":  # carried out, but the response does not arrive
            self.close_connection = True
            return
        text = b"" if reply is None else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        if status == 429:
            self.send_header("Retry-After", "2")
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = do_DELETE = answer

    def log_message(self, *args: Any) -> None:
        """Log nothing."""
