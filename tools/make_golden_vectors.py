"""Write heimdex_clip_worker/vectors/seeded.json: open_clip's own vectors with seeded weights.

    python tools/make_golden_vectors.py           # write the file
    python tools/make_golden_vectors.py --check   # say whether it would be written as it is

Needed again only when a photograph or a text is added, or the seeded weights change. Numbers differ
in their last digits between machines, so `--check` compares within 1e-5.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version
from typing import Any

from heimdex_clip_worker.artifact import drift, row_of, text_of, weights_digest
from heimdex_clip_worker.golden import FILE, MODEL, photographs, reference, seeded_state


def made() -> dict[str, Any]:
    """Return what the file says."""
    state = seeded_state()
    rows = reference(state)
    told = {
        "about": "open_clip's unit vectors, float32 in base64, of the weights of `seeded_state`",
        "model": MODEL,
        "activation": "quickgelu",
        "weights": weights_digest(state),
        "made_with": {name: version(name) for name in ("open_clip_torch", "torch", "pillow")},
        "sha256": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in photographs()},
    }
    return told | {kind: {k: text_of(row) for k, row in rows[kind].items()} for kind in rows}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return which vectors are not those of the other one."""
    pairs = [(kind, key) for kind in ("photos", "texts") for key in one[kind] | other[kind]]
    return [
        f"{kind}: {key[:60]}"
        for kind, key in pairs
        if key not in one[kind]
        or key not in other[kind]
        or drift(row_of(one[kind][key])[None], row_of(other[kind][key])[None]) > 1e-5
    ]


def main(argv: list[str]) -> int:
    """Write the file, or check it; return the exit status."""
    told = made()
    if argv == ["--check"]:
        differ = differences(told, json.loads(FILE.read_text(encoding="utf-8")))
        print(*(differ or [f"{FILE.name} is as it would be written"]), sep="\n")
        return 1 if differ else 0
    FILE.parent.mkdir(exist_ok=True)
    text = json.dumps(told, indent=1, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")
    print(f"{FILE.name}: {len(told['photos'])} photographs, {len(told['texts'])} texts")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
