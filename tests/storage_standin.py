"""A stand-in for Supabase Storage: objects in memory, on a free port of 127.0.0.1.

It implements the calls that `storage3` makes, as Storage does (github.com/supabase/storage):
upload, sign, read by signed URL, read with the key, list and remove. Its errors have Storage's
form as well: HTTP status 400 for all of them, and the real status in the body.
"""

from __future__ import annotations

import base64
import email
import email.policy
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

MISSING = "Either the object does not exist or you do not have access to it"
MAX_BYTES = 50_000_000  # Storage's own limit on the free plan


class Refused(Exception):
    """An error that Storage sends instead of a result."""

    def __init__(self, status: int, error: str, message: str):
        super().__init__(message)
        self.body = {"statusCode": str(status), "error": error, "message": message}


class StorageServer:
    """The stand-in, a context manager; `objects` holds what is stored."""

    def __init__(
        self,
        buckets: Iterable[str] = ("scenes",),
        clock: Callable[[], float] = time.time,  # Unix seconds
    ):
        self.buckets, self.clock = set(buckets), clock
        self.key = f"service-role-{secrets.token_hex(16)}"  # SUPABASE_SERVICE_ROLE_KEY
        self.objects: dict[str, tuple[bytes, str]] = {}  # "bucket/path" -> body, content type
        self.calls: Counter[str] = Counter()  # "POST object", "POST sign", "GET sign", ...
        self._signing_key = secrets.token_bytes(32)

    def __enter__(self) -> StorageServer:
        storage = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                storage.handle(self)

            do_GET = do_POST = do_PUT = do_DELETE = handle_request

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"  # SUPABASE_URL
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def env(self, bucket: str = "scenes") -> dict[str, str]:
        """Make the environment variables of a caller of this storage."""
        return {
            "SUPABASE_URL": self.url,
            "SUPABASE_SERVICE_ROLE_KEY": self.key,
            "SUPABASE_BUCKET": bucket,
        }

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """Handle one HTTP request."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        try:
            status, data, kind = 200, *self.dispatch(request, body)
        except Refused as refused:
            status, data, kind = 400, json.dumps(refused.body).encode(), "application/json"
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def dispatch(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[bytes, str]:
        """Return the response's body and content type; raise Refused."""
        url = urlsplit(request.path)
        version, _, path = url.path.removeprefix("/storage/v1/").partition("/")
        action, _, rest = path.partition("/")
        signs, lists = action == "sign", action == "list"
        name = unquote(rest if signs or lists else path)
        self.calls[f"{request.command} {action if signs or lists else version}"] += 1
        if not url.path.startswith("/storage/v1/object/"):
            raise Refused(404, "Not Found", f"Route {request.command}:{url.path} not found")
        if request.command == "GET" and signs:
            return self.read_signed(name, parse_qs(url.query).get("token", [""])[0])
        self.authenticate(request.headers.get("Authorization") or "")
        self.find_bucket(name.partition("/")[0])
        if request.command == "POST" and (signs or lists):
            act = self.list if lists else self.sign if "/" in name else self.sign_many
            return as_json(act(name, json.loads(body)))
        if request.command in ("POST", "PUT"):
            return as_json(self.write(name, request, body))
        if request.command == "DELETE":
            return as_json(self.remove(name, json.loads(body)["prefixes"]))
        return self.read(name)

    def authenticate(self, authorization: str) -> None:
        if not hmac.compare_digest(authorization.encode(), f"Bearer {self.key}".encode()):
            raise Refused(403, "Unauthorized", "Invalid Compact JWS")

    def find_bucket(self, bucket: str) -> None:
        if bucket not in self.buckets:
            raise Refused(404, "Bucket not found", "Bucket not found")

    def write(self, name: str, request: BaseHTTPRequestHandler, body: bytes) -> dict[str, str]:
        """Store the file of a multipart form; replace an object only if the request says so."""
        replace = request.command == "PUT" or request.headers.get("x-upsert") == "true"
        if name in self.objects and not replace:
            raise Refused(409, "Duplicate", "The resource already exists")
        head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
        form = email.message_from_bytes(head + body, policy=email.policy.HTTP)
        files = [part for part in form.iter_parts() if part.get_filename()]
        if not files:
            raise Refused(400, "InvalidRequest", "No content provided")
        data = files[0].get_payload(decode=True)
        if len(data) > MAX_BYTES:
            raise Refused(413, "Payload too large", "The object exceeded the maximum allowed size")
        self.objects[name] = data, files[0].get_content_type()
        return {"Id": secrets.token_hex(16), "Key": name}

    def read(self, name: str) -> tuple[bytes, str]:
        if name not in self.objects:
            raise Refused(404, "not_found", "Object not found")
        return self.objects[name]

    def sign(self, name: str, options: dict[str, Any]) -> dict[str, str]:
        """Sign a path that reads the object for `expiresIn` seconds."""
        self.read(name)
        seconds = int(options["expiresIn"])
        if seconds < 1:
            raise Refused(400, "Error", "body/expiresIn must be >= 1")
        now = int(self.clock())
        token = self.token({"url": name, "iat": now, "exp": now + seconds})
        return {"signedURL": f"/object/sign/{name}?token={token}"}

    def sign_many(self, bucket: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        """Sign each of `paths`, or return an error in its place."""
        entries = []
        for path in options["paths"]:
            entry = {"path": path, "signedURL": None, "error": MISSING}
            if f"{bucket}/{path}" in self.objects:
                entry |= self.sign(f"{bucket}/{path}", options) | {"error": None}
            entries.append(entry)
        return entries

    def read_signed(self, name: str, token: str) -> tuple[bytes, str]:
        """Read the object of a signed URL; raise Refused once the URL has expired."""
        claims = self.claims(token)
        if self.clock() >= claims["exp"]:
            raise Refused(400, "InvalidJWT", '"exp" claim timestamp check failed')
        if claims["url"] != name:
            raise Refused(400, "InvalidSignature", "Invalid signature")
        return self.read(name)

    def list(self, bucket: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        """List the objects of one folder, without those of folders below it."""
        start = "/".join(filter(None, [bucket, options.get("prefix", "").strip("/")])) + "/"
        names = [name.removeprefix(start) for name in self.objects if name.startswith(start)]
        return [{"name": name} for name in sorted(names) if "/" not in name][: options["limit"]]

    def remove(self, bucket: str, paths: list[str]) -> list[dict[str, str]]:
        """Remove objects; a missing one is not an error."""
        removed = [path for path in paths if self.objects.pop(f"{bucket}/{path}", None)]
        return [{"bucket_id": bucket, "name": path} for path in removed]

    # A signed URL carries a JWT (RFC 7519), signed with HMAC-SHA256.

    def token(self, claims: dict[str, Any]) -> str:
        parts = [encode_part({"alg": "HS256", "typ": "JWT"}), encode_part(claims)]
        return ".".join([*parts, self.signature(parts)])

    def signature(self, parts: list[str]) -> str:
        mac = hmac.new(self._signing_key, ".".join(parts).encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(mac.digest()).decode().rstrip("=")

    def claims(self, token: str) -> dict[str, Any]:
        """Read a token; raise Refused if it was not made here."""
        *parts, mac = token.split(".")
        if len(parts) != 2 or not hmac.compare_digest(self.signature(parts), mac):
            raise Refused(400, "InvalidJWT", "signature verification failed")
        return json.loads(base64.urlsafe_b64decode(parts[1] + "=="))


def encode_part(value: dict[str, Any]) -> str:
    """Encode a part of a JWT."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def as_json(value: Any) -> tuple[bytes, str]:
    return json.dumps(value).encode(), "application/json"
