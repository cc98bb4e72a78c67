"""Write heimdex_clip_worker/vectors/seeded.json: open_clip's own vectors with seeded weights.

    python tools/make_golden_vectors.py           # write the file
    python tools/make_golden_vectors.py --check   # compare the file with what would be written

Run it when a photograph or a text is added, or the seeded weights change. The last digits differ
between machines, so `--check` compares within 1e-5.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

from heimdex_clip_worker.model import golden
from heimdex_clip_worker.model.artifact import weights_digest
from heimdex_clip_worker.model.golden import FILE, row_from_text, row_to_text
from heimdex_clip_worker.model.photos import photographs
from heimdex_clip_worker.model.weights import file_digest


def make() -> dict[str, Any]:
    """Compute the content of the file."""
    state = golden.seeded_state()
    content = {
        "about": "open_clip's unit vectors, float32 in base64, of the weights of `seeded_state`",
        "model": golden._MODEL,
        "activation": "quickgelu",
        "weights": weights_digest(state),
        "made_with": {name: version(name) for name in ("open_clip_torch", "torch", "pillow")},
        "sha256": {path.name: file_digest(path) for path in photographs()},
    }
    for kind, rows in golden.reference(state).items():
        content[kind] = {key: row_to_text(row) for key, row in rows.items()}
    return content


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """List the vectors that differ."""

    def differ(kind: str, key: str) -> bool:
        if key not in one[kind] or key not in other[kind]:
            return True
        row, golden_row = (row_from_text(content[kind][key])[None] for content in (one, other))
        return golden.drift(row, golden_row) > 1e-5

    pairs = [(kind, key) for kind in ("photos", "texts") for key in one[kind] | other[kind]]
    return [f"{kind}: {key[:60]}" for kind, key in pairs if differ(kind, key)]


def main(argv: list[str]) -> int:
    """Write the file, or check it; return the exit status."""
    content = make()
    if argv == ["--check"]:
        changed = differences(content, json.loads(FILE.read_text(encoding="utf-8")))
        print(*(changed or [f"{FILE.name} is as it would be written"]), sep="\n")
        return 1 if changed else 0
    FILE.parent.mkdir(exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")
    print(f"{FILE.name}: {len(content['photos'])} photographs, {len(content['texts'])} texts")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
