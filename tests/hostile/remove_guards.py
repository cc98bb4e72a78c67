"""Remove each guard in turn and check that a test notices: `make guards`.

A comment in the code, `# guard: name`, marks the line (several names are separated by `; `; a
comment alone on its line marks the next one); the entry here says how to change the code to remove
it. The package is copied aside with that one change, and the test that the table in
`nbs/06a_guards.ipynb` names is run against the copy; if it passes, all tests of the module are
run. Prints the table anew and exits with 1 when no test notices. `test_guards.py` checks in every
run that each entry has its comment and each comment its entry, and that the table has both.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "heimdex_clip_worker"
NOTEBOOK = ROOT / "nbs" / "06a_guards.ipynb"  # its table names the test that notices each guard
HOSTILE = "tests/hostile"
FILES = {
    "auth": "auth.py", "contract": "contract.py", "handler": "handler.py",
    "connection": "serving/connection.py", "pool": "serving/pool.py",
    "loop": "serving/loop.py", "download": "serving/download.py", "avif": "serving/avif.py", "decode": "serving/decode.py",
    "png": "serving/png.py",
    "watchdog": "serving/watchdog.py",
    "budget": "serving/budget.py", "batcher": "serving/batcher.py",
    "pipeline": "serving/pipeline.py", "selftest": "serving/selftest.py",
    "intake": "serving/intake.py", "child": "serving/child.py", "children": "serving/children.py",
    "preprocess": "model/preprocess.py", "cuda": "model/cuda.py", "image": "model/image.py",
    "golden": "model/golden.py",
    "weights": "model/weights.py",
    "rows": "backfill/rows.py", "files": "backfill/files.py",
    "postgres": "backfill/postgres.py", "triggers": "database/triggers.py",
    "parquet": "backfill/parquet.py",
    "sync": "database/sync.py", "status": "database/status.py",
    "blocks": "backfill/blocks.py", "shards": "backfill/shards.py",
    "ray": "ray.py", "backfill_ray": "cli/backfill_ray.py", "local": "remote/local.py",
    "endpoint": "remote/endpoint.py",
    "settings": "settings.py", "process": "serving/process.py",
    "client": "client.py", "deploy": "cli/deploy.py",
    "search": "database/search.py", "search_table": "cli/search_table.py",
    "migrate": "database/migrate.py", "migrate_command": "cli/migrate.py",
    "index": "database/index.py", "index_command": "cli/index.py",
    "recall": "database/recall.py",
    "audit": "database/audit.py", "audit_command": "cli/audit.py",
}  # fmt: skip
TESTS = {
    "auth": [f"{HOSTILE}/test_auth_rows.py", "tests/test_auth.py"],
    "contract": [f"{HOSTILE}/test_payload_rows.py", f"{HOSTILE}/test_many_rows.py"],
    "connection": [f"{HOSTILE}/test_poison_rows.py", f"{HOSTILE}/test_network_rows.py"],
    "pool": [f"{HOSTILE}/test_poison_rows.py"],
    "loop": ["tests/serving/test_loop.py"],
    "download": [f"{HOSTILE}/test_network_rows.py", "tests/serving/test_download.py"],
    "avif": ["-k", "avif", f"{HOSTILE}/test_image_rows.py"],
    "png": ["-k", "png", f"{HOSTILE}/test_image_rows.py"],
    "decode": [f"{HOSTILE}/test_image_rows.py", "tests/serving/test_decode.py"],
    "preprocess": [f"{HOSTILE}/test_image_rows.py", "tests/serving/test_decode.py"],
    "cuda": ["tests/model/test_cuda.py"],
    "image": [
        "tests/serving/test_decode.py",
        "tests/model/test_embed.py",
        "tests/model/test_cuda.py",
    ],
    "budget": [f"{HOSTILE}/test_many_rows.py"],
    "watchdog": ["tests/serving/test_watchdog.py", f"{HOSTILE}/test_fault_rows.py"],
    "batcher": [
        "tests/serving/test_batcher.py",
        f"{HOSTILE}/test_fault_rows.py",
        "tests/model/test_cuda.py",
    ],
    "pipeline": [
        f"{HOSTILE}/test_fault_rows.py",
        f"{HOSTILE}/test_many_rows.py",
        "tests/serving/test_children.py",
    ],
    "intake": ["tests/serving/test_intake.py"],
    "child": ["tests/serving/test_children.py"],
    "children": ["tests/serving/test_children.py"],
    "handler": [
        f"{HOSTILE}/test_payload_rows.py",
        f"{HOSTILE}/test_fault_rows.py",
        f"{HOSTILE}/test_many_rows.py",
        f"{HOSTILE}/test_log.py",
    ],
    "selftest": [f"{HOSTILE}/test_selftest_rows.py"],
    "golden": [f"{HOSTILE}/test_selftest_rows.py"],
    "weights": ["tests/model/test_bake.py"],
    "rows": ["tests/backfill/test_files.py"],
    "files": ["tests/backfill/test_files.py", "tests/backfill/test_shards.py"],
    "parquet": ["tests/backfill/test_out.py"],
    "blocks": ["tests/backfill/test_shards.py"],
    "shards": ["tests/backfill/test_shards.py"],
    "ray": ["tests/backfill/test_ray.py"],
    "backfill_ray": ["tests/backfill/test_shards.py"],
    "local": ["tests/backfill/test_ray.py"],
    "postgres": ["tests/backfill/test_table.py"],
    "triggers": ["tests/backfill/test_table.py"],
    "sync": ["tests/backfill/test_sync.py"],
    "status": ["tests/database/test_status.py"],
    "endpoint": ["tests/test_client.py"],
    "settings": ["tests/project/test_settings.py"],
    "process": [
        "tests/serving/test_host.py",
        "tests/serving/test_intake.py",
        f"{HOSTILE}/test_log.py",
    ],
    "client": ["tests/test_client.py"],
    "deploy": ["tests/cli/test_deploy.py"],
    "search": ["tests/database/test_search_table.py"],
    "search_table": ["tests/database/test_search_table.py"],
    "migrate": ["tests/database/test_migrate.py"],
    "migrate_command": ["tests/database/test_migrate.py"],
    "index": ["tests/database/test_index.py"],
    "index_command": ["tests/database/test_index.py"],
    "recall": ["tests/database/test_index.py"],
    "audit": ["tests/backfill/test_audit_table.py"],
    "audit_command": ["tests/cli/test_audit.py"],
}


NEVER, ALWAYS, SKIP = "never", "always", "skip"


class Guard(NamedTuple):
    """A line that protects the worker, marked `# guard: name` in the code."""

    module: str
    name: str
    without: str | tuple[str, str]  # how to change the code: see `changed`


AUTH = [
    ("the signature itself, v1", SKIP),
    ("v1 covers no other field", (r"all\(.*\)", "True")),
    ("a time is an integer", (r"type\(\w+\) is not int or ", "")),
    ("the window, past", NEVER),
    ("the window, future", NEVER),
    ("a sig is 64 hex digits", SKIP),
    ("v2 auth has exactly its fields", SKIP),
    ("exp after ts", NEVER),
    ("nesting depth", NEVER),
    ("integers that JSON can hold", NEVER),
]
CONNECTION = [
    ("no read of tiny records", SKIP),
    ("TLS brings data", NEVER),
    ("the head allows another request", SKIP),
    ("not a byte more or less", SKIP),
    ("no more than is read", NEVER),
    ("one response", NEVER),
    ("lines are limited", NEVER),
    ("headers are limited", NEVER),
    ("a length has few digits", NEVER),
    ("interim responses are limited", NEVER),
    ("chunks are read strictly", SKIP),
    ("tiny pieces are joined", ALWAYS),
    ("lines that do not end are limited", NEVER),
    ("bytes besides the body", NEVER),
    ("only a checked certificate gives time", ALWAYS),
    ("sessions expire", (r" if .* else None", "")),
    ("room for a part of a record", (r" \+ _PARTIAL_BYTES", "")),
    ("no bytes without a request", SKIP),
    ("nothing waits in the TLS layer", NEVER),
    ("nothing waits in the socket", ("False", "True")),
]
POOL = [
    ("one repeat, if the server closed a kept connection", NEVER),
    ("what is refused ends the connection", ("False", "True")),
    ("looked at again before use", (r"return .*", "return True")),
    ("a connection has its time", (r"=.*", "= True")),
    ("fewer connections to a host that refuses", NEVER),
]
LOOP = [
    ("an exit stays in its call", (r"\(SystemExit, KeyboardInterrupt\)", "ZeroDivisionError")),
]
DOWNLOAD = [
    ("never the metadata service", NEVER),
    ("public addresses only", NEVER),
    ("ports 80 and 443", NEVER),
    ("length of a URL", (r" <= \w+", "")),
    ("printable ASCII, no backslash", NEVER),
    ("plain host names", NEVER),
    ("plain dotted quads", ALWAYS),
    ("a suffix begins with a dot", (r"\[1:\]", "[2:]")),
    ("http and https", NEVER),
    ("two parsers agree, no user", NEVER),
    ("http can be switched off", NEVER),
    ("the host list", NEVER),
    ("a lookup has a deadline", (r"asyncio\.wait_for\((.+), [\w.]+\)", r"\1")),
    ("answers are kept for seconds", NEVER),
    ("every address of a name", SKIP),
    ("the address before a connection", SKIP),
    ("no costly ciphers", SKIP),
    ("no costly groups", SKIP),
    ("one handshake", SKIP),
    ("no coding but gzip", (r"raise .*", "return False")),
    ("nothing follows the gzip", NEVER),
    ("others have their turn", SKIP),
    ("gzip ends with the body", NEVER),
    ("bytes as sent and decompressed", NEVER),
    ("tiny chunks are joined", ALWAYS),
    ("only status 200", NEVER),
    ("bytes as sent", NEVER),
    ("one Location", (r"if len\((\w+)\) != 1", r"if not \1")),
    ("no redirect from https to http", NEVER),
    ("a server that is busy is asked again once", SKIP),
    ("a fetch has a deadline", (r"timeout_s=\w+", "timeout_s=None")),
]
DECODE = [
    ("only known formats", (r"raise .*", 'return "JPEG"')),
    ("a limit on parts", (r"20_000\b", "20_000_000")),
    ("a side limit", NEVER),
    ("a pixel limit", NEVER),
    ("a scan limit", NEVER),
    ("16-bit grey is scaled", NEVER),
    ("an AVIF is rewritten", SKIP),
    ("Huffman tables count", NEVER),
    ("memory is known before decoding", NEVER),
    ("decoded completely", SKIP),
]
CONTRACT = [
    ("a request_id is printable", NEVER),
    ("a request_id is short", NEVER),
    ("a source is text", NEVER),
    ("length of a text", NEVER),
    ("length of a URL", NEVER),
    ("normalize is true or false", NEVER),
    ("an image is an object", NEVER),
    ("unknown fields of an image are refused", NEVER),
    ("images and texts are lists", NEVER),
    ("the number of items is bounded", NEVER),
    ("the input is an object", NEVER),
    ("a model's name is text", NEVER),
    ("encodings are known", NEVER),
    ("the reply fits", SKIP),
    ("unknown fields are refused", NEVER),
    ("one form at once", NEVER),
]
AVIF = [
    ("a limit on boxes", (r"20_000\b", "20_000_000")),
    ("a box fits into its parent", NEVER),
    ("a limit on tables", NEVER),
    ("an extent takes bytes in the table", NEVER),
    ("no bytes in another item", NEVER),
    ("one property of a kind", (r"\.setdefault\((\w+), (.*)\)", r"[\1] = \2")),
    ("no unknown essentials", NEVER),
    ("a limit on units", (r"100\b", "100_000")),
    ("deep colours cost more", (r"1\.25", "1")),
    ("film grain costs double", SKIP),
    ("a frame may have its own size", (r"return .*", "return False")),
    ("scaling costs pixels", SKIP),
    ("alpha in colour costs double", SKIP),
    ("a limit on sequence headers", NEVER),
    ("every frame counts", (r"\+=", "=")),
    ("extents lie within the file", NEVER),
    ("extents do not overlap", NEVER),
    ("a limit on the units of all cells", NEVER),
    ("a limit on cells", NEVER),
    ("a limit on the pixels of all cells", NEVER),
]
PNG = [
    ("a limit on chunks", (r"20_000\b", "20_000_000")),
    ("one header, the first chunk", NEVER),
]
PREPROCESS = [("very long images are cut", ALWAYS)]
CUDA = [
    (
        "a slot is free when nothing refers to it",
        (r"weakref\.finalize\(slot, (.*), number\).*", r"\1(number)"),
    ),
    ("a batch is launched as a whole", (r"with .*:", "if True:")),
    ("rows are read when they are there", SKIP),
    ("padding is no result", (r"\[:count\]", "")),
    ("a failed batch copies nothing any more", SKIP),
    ("pixels are read when they are there", SKIP),
]
IMAGE = [
    ("out of memory is not the end", NEVER),
    ("an accelerator's own error is fatal", NEVER),
    ("the words of a lost device", NEVER),
    ("a device that computes nothing", (r" and not .*", "")),
    ("what a lost device held is never freed", SKIP),
    ("vectors have a length", NEVER),
    ("a device that is lost at the start is told", NEVER),
]
BUDGET = [
    ("what is released is for a job that holds nothing", SKIP),
    ("jobs that hold nothing take turns", SKIP),
    ("bytes in flight", NEVER),
    ("no job takes the whole budget", (r"return .*", "return True")),
]
WATCHDOG = [
    ("a thread's exit stays in its job", (r"except \(.*\)", "except ()")),
    ("Python waits for no thread", (r"daemon=True", "daemon=False")),
    ("the end needs no interpreter lock", SKIP),
    ("a longer limit ends with its call", SKIP),
    ("what hangs is bounded", NEVER),
    ("a doomed process runs nothing", NEVER),
    ("a worker may be frozen right after a job", SKIP),
    ("an idle worker has no timer", SKIP),
    ("a doomed process ends", SKIP),
    ("no thread delays the end", NEVER),
    ("a call that hangs is found", SKIP),
    ("a process that stands still ends", SKIP),
]
BATCHER = [
    ("batches in flight", NEVER),
    ("a bad batch is halved", NEVER),
    ("a fatal fault is not retried", NEVER),
    (
        "jobs take turns in a batch",
        (r"(self\._entries)\[job\] = entries", r"\g<0>; \1.move_to_end(job, last=False)"),
    ),
]
PIPELINE = [
    ("as many rows as items", NEVER),
    ("images in flight", (r"= .* // [\w.]+", "= 0")),
    ("no job takes all decode slots", (r"async with .*:", "if True:")),
    ("a large image that hangs counts more", (r"weight=.*\)", "weight=1)")),
    ("large images share memory", (r"self\.large_bytes\.reserve\(count, job\), ", "")),
    ("slow downloads give way", (r"with .*:", "if True:")),
    ("jobs take turns with texts", (r"async with .*:", "if True:")),
    ("without children, threads go on", ("_NoChildren", "KeyError")),
    ("without children, threads fetch", ("_NoChildren", "KeyError")),
]
CHILD = [
    ("a text is one line", NEVER),
    (
        "an answer has one of four forms",
        (r"raise ValueError\(.*\)", "return json.loads(data)['number'], 5"),
    ),
    ("a child ends when its socket is closed", NEVER),
    ("without memory, a child ends before the worker does", SKIP),
]
CHILDREN = [
    ("children end with their worker", SKIP),
    ("without more processes, those that run go on", ("OSError", "KeyError")),
    ("shared memory keeps its size", SKIP),
    ("a place is in use until its child has answered", (r"\.popleft\(\)", "[0]")),
    ("a slow child gets its messages", SKIP),
    ("nobody floods the worker with answers", (r"self\._unasked < 0 or ", "")),
    ("a child that sends anything else is ended", ("Exception", "KeyError")),
    ("a child always has places for what it decodes", NEVER),
    ("pixels stay until nothing refers to them", (r"weakref\.finalize\(\w+, (.*), (.*)\)\..*", r"\1(\2)")),
    ("a loop that stood still reads its answers first", NEVER),
    ("a child that does not answer is ended", SKIP),
    ("what shares a child with one that hangs is not blamed", (r"decoding in .*\) and ", "")),
    ("a child whose socket is closed ends, too", SKIP),
    ("a doubtful file is decoded alone", (r"AT_ONCE if self\.ends else ", "")),
    ("doubtful files end one child at a time", (r"self\.children\.doubtful if self\.ends else ", "")),
    ("a file whose child ends is decoded again", ("_ChildEnded", "KeyError")),
    ("a file that moves keeps to its reservation", NEVER),
    ("a doubtful file does not end the worker", ALWAYS),
    ("a file that nobody needs is dropped", SKIP),
    ("all children together keep to the connections of a host", (r" // self\._count", "")),
    ("no child changes what others are told", SKIP),
    ("a late reply is not that of another child", (r"number != .*:", "not number:")),
    ("without a fork server nothing is tried again", SKIP),
    ("children that cannot start are given up for a while", (r"self\._failures >= .* or ", "")),
    ("answers stay in their loop", SKIP),
    ("a child's fetch has a deadline", (r"= .*", "= 1000.0")),
    ("a file whose child ends is fetched again", ("_ChildEnded", "KeyError")),
]
INTAKE = [
    ("jobs begin before the SDK seems full", NEVER),
    ("images in hand are bounded", NEVER),
    ("jobs are as large as those before", (r"= .*", "= limit")),
    ("large jobs come in a handful", SKIP),
    ("taken images count at once", (r"in zip\(.*\)", "in ()")),
]
HANDLER = [
    (
        "the signature is verified",
        (
            r"= verify\(.*\)",
            "= __import__('heimdex_clip_worker.auth').auth.Credential(1, 'v1')",
        ),
    ),
    ("unknown fields are refused", SKIP),
    ("replies are JSON", SKIP),
    ("SystemExit stays in its job", ("BaseException", "Exception")),
    ("SystemExit stays in its item", ("BaseException", "Exception")),
    ("a fault stays with its item", (r"_reply_or_error\((\w+), \w+\)", r"\1")),
    ("an invalid item is an error", NEVER),
    ("a lost device stays lost", NEVER),
    ("a lost device ends the worker", SKIP),
    ("a device lost in one item ends the worker", NEVER),
    ("jobs are answered before the process ends", SKIP),
    ("a device that fails at the start is told", (r"errors\.InferenceFailed", "ZeroDivisionError")),
    ("idle GPUs are told", NEVER),
    ("a GPU host has a GPU", (r", _host_problems", "")),
    ("a busy worker logs less", (r"= .*", "= False")),
]
SELFTEST = [
    ("true itself", (r" is True", "")),
    ("no other field", NEVER),
    ("once in ten seconds", (r"return .*", "return True")),
    ("one run for all callers", NEVER),
    ("a run outlives its job", (r"asyncio\.wait\(\[(\w+)\]\)", r"\1")),
]
GOLDEN = [("the golden vector", (r"not \w+ <=", "not 0 <="))]
WEIGHTS = [("the pinned weights", NEVER)]
ROWS = [
    ("a URL is text", NEVER),
    ("floats are exact", (r" and abs\(value\) < 1 << 53", "")),
]
FILES_OF_ROWS = [
    ("a column is there once", NEVER),
    ("a row has all fields", NEVER),
    ("no space before an opening quote", NEVER),
    ("no text behind a closing quote", NEVER),
    ("no stray quote in several lines", NEVER),
    ("several lines have all fields", NEVER),
    ("lines are not rows themselves", NEVER),
    ("quotes are closed", NEVER),
    ("no half of an escape", NEVER),
    ("rows behind the end mark are reported", NEVER),
    ("a backslash joins no whole rows", NEVER),
    ("a key is there once", NEVER),
    ("columns can hold ids and URLs", NEVER),
    ("bytes are decoded cell by cell", NEVER),
    ("small floats are exact", NEVER),
    ("only whole parts are read", NEVER),
]
PARQUET = [
    ("None is no id", NEVER),
]
BLOCKS = [
    ("one space for a folder", SKIP),
    ("an image is bytes", NEVER),
    ("no column of the caller is replaced", NEVER),
]
SHARDS = [
    ("a URI means one file", NEVER),
    ("no key of a store in a name", (r"without_query\(text\)", "text")),
    ("parts are no input", NEVER),
    ("paths are not quoted", (r"name if .*", "name")),
    ("a file of the same size is noticed", (r"= system.*", "= 0")),
    ("no kept column replaces ours", NEVER),
    ("kept columns can be written", SKIP),
    ("a kept column has one type", NEVER),
    ("a file is there once", NEVER),
    ("the file is the planned one", NEVER),
    ("no rows of two files", SKIP),
    ("no row is missing", (r"raise .*", "return")),
    ("parts are whole", (r"= final.*", "= final")),
    ("one run begins a folder", (r"os\.link", "os.replace")),
    ("damage is no absence", NEVER),
    ("an entry is one of ours", NEVER),
    ("a folder has one space", NEVER),
    ("all parts are one table", NEVER),
    ("a layout that was lost is not invented", NEVER),
    ("inputs stay as they were", NEVER),
    ("a part that was deleted is missed", NEVER),
    ("an entry is of the same file", NEVER),
    ("a whole shard is not repeated", NEVER),
    ("the vectors of a part can be compared", NEVER),
    ("the first of two runs keeps its part", NEVER),
    ("a space that changed meanwhile is noticed", NEVER),
    ("part and entry are of one run", NEVER),
]
RAY = [
    ("the device is Ray's decision", (r' \| \{"CLIP_DEVICE".*', "")),
    ("golden vectors before the first block", SKIP),
    ("Ray reports nothing", SKIP),
    ("an outage ends the run", NEVER),
    ("what no repetition mends ends the run", (r"UsageError", "KeyError")),
    ("Ray repeats the shard", (r"raise", "pass")),
    ("one image does not stop a run for ever", NEVER),
]
BACKFILL_RAY = [
    ("done means that all are whole", NEVER),
    ("no folder gets a second space", NEVER),
    ("one space for all parts", NEVER),
]
LOCAL = [
    ("held bytes have the limit too", NEVER),
]
POSTGRES = [
    ("a result is of its picture", (r"_IS_SAME_URL if has_url else ", "")),
    ("no column gets vectors of another space", (r"_IS_SAME_COLUMN", '"true"')),
    ("no row is embedded for ever", NEVER),
    (
        "no row is waited for while another is locked",
        (r"_find_each\(statement", '_find_each(f"{statement}_waiting"'),
    ),
    (
        "one locked row does not hold up all others",
        (r"except _Refusal", "except ZeroDivisionError"),
    ),
    ("what is counted as written is there", (r"= .*", "= set()")),
    ("no result is written for ever", NEVER),
]
TRIGGERS = [
    ("names in a trigger are PostgreSQL's own", (r'"SET.*"', '""')),
    ("another picture clears the vector", (r'\["changed"\]', "[]")),
]
STATUS = [
    ("text that is no time fails nothing", (r'".*"', '"^[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}"')),
]
SYNC = [("a column gets vectors of its own space", NEVER)]
ENDPOINT = [
    ("a response has a deadline", NEVER),
    ("a response has a size", NEVER),
    (
        "bodies of redirects are not read",
        (r"return None", "return super().get_redirect_target(response)"),
    ),
]
SETTINGS = [
    ("a template is no key", SKIP),
    ("published secrets are no secrets", NEVER),
    ("templates are filled in", SKIP),
    ("the hub's secret is for its tests", NEVER),
]
PROCESS = [
    ("groups above count", (r", \*inner\.parents", ",")),
    ("a quota of CPU time", SKIP),
    ("torch heeds the quota", SKIP),
    ("jobs are taken through the intake", SKIP),
    ("no query in the log", (r"return .*", "return text")),
    ("a record is a line", (r"return .*", "return text")),
]
CLIENT = [
    ("a crash loop is not hidden", NEVER),
    ("idle is not ready", NEVER),
]
DEPLOY = [
    ("one GPU is paid for", NEVER),
]
SEARCH = [
    ("a condition loses no rows", SKIP),
    ("the user's SQL changes nothing", SKIP),
]
SEARCH_TABLE = [
    ("text stays text", (r"return .*", "return str(value)")),
    ("no script as a URL", (r" or not is_url\(url\)", "")),
    ("signed URLs are for this user", ("0o600", "0o644")),
    ("cosines within one space", SKIP),
    ("a sample has not seen every row", SKIP),
]
MIGRATE = [
    ("what is dropped in the end is no column that serves", NEVER),
    ("readers wait for a moment only", SKIP),
    ("a vector never belongs to another picture", SKIP),
    ("hidden rows are counted too", NEVER),
    ("no row loses its vector", NEVER),
]
MIGRATE_COMMAND = [
    ("a type alone", NEVER),
]
INDEX = [
    ("an index that is valid stays", (r" and not index.is_valid", "")),
    ("another index is not taken for the one", NEVER),
    ("no index is dropped that another process may be building", NEVER),
]
INDEX_COMMAND = [("a filter changes nothing", SKIP)]
RECALL = [("a measurement changes nothing, whatever SQL it is given", SKIP)]
AUDIT = [
    ("a repair leaves rows with another picture alone", (r'".*",', '"has_same_url": "true",')),
    ("a repair leaves newer vectors alone", (r'""".*"""', '"true"')),
    ("a repair with the wrong model is refused", NEVER),
]
AUDIT_COMMAND = [
    ("a table names no files of this machine", (r"with_files", "True")),
]
GUARDS = [
    Guard(module, *entry)
    for module, entries in (
        ("auth", AUTH),
        ("connection", CONNECTION),
        ("pool", POOL),
        ("loop", LOOP),
        ("download", DOWNLOAD),
        ("contract", CONTRACT),
        ("avif", AVIF),
        ("png", PNG),
        ("decode", DECODE),
        ("preprocess", PREPROCESS),
        ("cuda", CUDA),
        ("image", IMAGE),
        ("budget", BUDGET),
        ("watchdog", WATCHDOG),
        ("batcher", BATCHER),
        ("pipeline", PIPELINE),
        ("intake", INTAKE),
        ("child", CHILD),
        ("children", CHILDREN),
        ("handler", HANDLER),
        ("selftest", SELFTEST),
        ("golden", GOLDEN),
        ("weights", WEIGHTS),
        ("rows", ROWS),
        ("files", FILES_OF_ROWS),
        ("postgres", POSTGRES),
        ("triggers", TRIGGERS),
        ("parquet", PARQUET),
        ("sync", SYNC),
        ("status", STATUS),
        ("blocks", BLOCKS),
        ("shards", SHARDS),
        ("ray", RAY),
        ("backfill_ray", BACKFILL_RAY),
        ("local", LOCAL),
        ("endpoint", ENDPOINT),
        ("settings", SETTINGS),
        ("process", PROCESS),
        ("client", CLIENT),
        ("deploy", DEPLOY),
        ("search", SEARCH),
        ("search_table", SEARCH_TABLE),
        ("migrate", MIGRATE),
        ("migrate_command", MIGRATE_COMMAND),
        ("index", INDEX),
        ("index_command", INDEX_COMMAND),
        ("recall", RECALL),
        ("audit", AUDIT),
        ("audit_command", AUDIT_COMMAND),
    )
    for entry in entries
]


def marked(text: str) -> dict[str, list[int]]:
    """Find the lines, counted from 1, that the comments of a module mark, by guard."""
    lines: dict[str, list[int]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        code, mark, names = line.partition("# guard: ")
        for name in names.split("; ") if mark else ():
            lines.setdefault(name, []).append(number if code.strip() else number + 1)
    return lines


def changed(text: str, number: int, without: str | tuple[str, str]) -> str:
    """Change line `number` of a module's text; raise ValueError when that is impossible.

    NEVER and ALWAYS decide the condition that begins there. SKIP removes the statement, the
    argument or the operand. A pair is a pattern that matches once, and its replacement.
    """
    lines = text.splitlines(keepends=True)
    if isinstance(without, tuple):
        line, count = re.subn(*without, lines[number - 1].partition("  # guard: ")[0].rstrip("\n"))
        if count != 1:
            raise ValueError(f"{without[0]!r} is {count} times in {lines[number - 1]!r}")
        return "".join([*lines[: number - 1], line + "\n", *lines[number:]])
    nodes = [n for n in ast.walk(ast.parse(text)) if getattr(n, "lineno", None) == number]
    if without == SKIP:
        statements = [n for n in nodes if isinstance(n, (ast.Expr, ast.Assign, ast.AugAssign))]
        node, new = (statements[0], "pass") if statements else (None, "")
    else:
        node = next(n.test for n in nodes if isinstance(n, (ast.If, ast.While)))
        new = str(without == ALWAYS)
    first, last = (node.lineno, node.end_lineno) if node else (number, number)
    start, end = (node.col_offset, node.end_col_offset) if node else (0, len(lines[number - 1]) - 1)
    head, tail = lines[first - 1][:start], lines[last - 1][end:]
    return "".join([*lines[: first - 1], head + new + tail, *lines[last:]])


def text_without(guard: Guard) -> str:
    """Take one guard out of its module's text; raise ValueError unless it is marked once."""
    text = (PACKAGE / FILES[guard.module]).read_text(encoding="utf-8")
    places = marked(text).get(guard.name, [])
    if len(places) != 1:
        raise ValueError(f"{guard.module}: `# guard: {guard.name}` is there {len(places)} times")
    new = changed(text, places[0], guard.without)
    ast.parse(new)
    return new


def copy_without(guard: Guard, folder: Path) -> None:
    """Copy the package into `folder` without one guard."""
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / FILES[guard.module]).write_text(text_without(guard), encoding="utf-8")


def known() -> dict[tuple[str, str], str]:
    """Read from the notebook's table which test notices each guard, by module and name."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    rows = re.findall(r"^\| (\w+) \| (.+?) \| `(.+?)` \|$", text, re.MULTILINE)
    return {(module, name): test for module, name, test in rows}


def noticed_by(guard: Guard, tests: list[str], limit_s: float = 240) -> str:
    """Find the first of `tests` that fails without `guard`; "" when all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy_without(guard, Path(folder))
        for name in ("tests", "tools"):  # pytest puts its own root first: so the tests move too
            shutil.copytree(ROOT / name, Path(folder) / name)
        for name in ("conftest.py", "pyproject.toml", "settings.ini", "test_vectors.json"):
            shutil.copy(ROOT / name, folder)
        (ROOT / ".cache").mkdir(exist_ok=True)
        (Path(folder) / ".cache").symlink_to(ROOT / ".cache")
        command = [
            str(Path(sys.executable).parent / "pytest"),
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
        ]
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            ran = subprocess.run(
                [*command, *tests],
                cwd=folder,
                env=env,
                text=True,
                capture_output=True,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            return tests[0].removeprefix("tests/") if len(tests) == 1 else "(the tests hang)"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?: - |$)", ran.stdout, re.M)
    return failed[1].removeprefix("tests/") if ran.returncode == 1 and failed else ""


def main() -> None:
    """Print the table; exit with status 1 when a guard can be removed unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", choices=sorted(TESTS), help="only this module's guards")
    parser.add_argument("--name", default="", help="only guards whose name contains this")
    parser.add_argument("--search", action="store_true", help="do not try the known test first")
    args = parser.parse_args()
    chosen = [g for g in GUARDS if args.module in (None, g.module) and args.name in g.name]
    print("| module | guard | without it fails |\n| --- | --- | --- |", flush=True)
    unnoticed, tests = 0, known()
    for guard in chosen:
        test = tests.get((guard.module, guard.name))
        failed = noticed_by(guard, [f"tests/{test}"]) if test and not args.search else ""
        failed = failed or noticed_by(guard, TESTS[guard.module])
        unnoticed += not failed
        where = f"`{failed}`" if failed else "**nothing**"
        print(f"| {guard.module} | {guard.name} | {where} |", flush=True)
    print(f"\n{len(chosen)} guards, {unnoticed} unnoticed")
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
