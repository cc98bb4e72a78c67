"""pgbouncer in transaction mode, as Supabase's port 6543 is, in front of a server of the tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
from local_worker import free_port

BINARY = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


@contextlib.contextmanager
def transaction_pooler(socket: str, user: str) -> Iterator[str]:
    """Run pgbouncer with a single connection to the server in the folder `socket`; yield a URI."""
    home = Path(tempfile.mkdtemp())
    port, config = free_port(), home / "pgbouncer.ini"
    (home / "users.txt").write_text(f'"{user}" ""\n')
    config.write_text(
        f"[databases]\npostgres = host={socket} user={user}\n[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = trust\n"
        f"auth_file = {home}/users.txt\npool_mode = transaction\ndefault_pool_size = 1\n"
        f"logfile = {home}/log\npidfile = {home}/pid\n"
    )
    owner = Path(socket).owner()
    for path in (home, *home.iterdir()):
        shutil.chown(path, owner)
    root = ["-u", owner] if os.geteuid() == 0 else []  # it refuses to run as root
    process = subprocess.Popen([BINARY, *root, str(config)], stderr=subprocess.DEVNULL)
    uri = f"postgresql://{user}@127.0.0.1:{port}/postgres"
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(uri, connect_timeout=5).close()
                break
            except psycopg.OperationalError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        yield uri
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(home)
