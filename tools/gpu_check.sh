#!/bin/sh
# Prove and measure everything on a machine with CUDA: `bash tools/gpu_check.sh OUT [OPTION ...]`.
# The results appear in the folder OUT while it runs. `--help` in place of OUT lists the options.
#
# Where `make gpu-kit` has left its wheels, they are installed into a temporary environment on top of
# the packages that $PYTHON (default: python3) has. Elsewhere, and with KIT=none, $PYTHON has to have
# everything.
set -eu

if [ $# = 0 ]; then
    echo "usage: bash tools/gpu_check.sh OUT [--device cpu] [--short] [--only PART] ..." >&2
    exit 2
fi
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
wheels=${KIT:-$root/kit}/wheels
unset PYTHONPATH PYTHONHOME

if [ -d "$wheels" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    "$python" -m venv --without-pip "$folder/env"
    # `site` runs this line: the packages of $PYTHON, which may itself be that of an environment,
    # come after those of the kit.
    "$python" - "$folder/env/bin/python" <<'END'
import subprocess, sys, sysconfig
def folders(python):
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.check_output([python, "-c", code], text=True).strip()
have = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
lines = [f"import site; site.addsitedir({path!r})" for path in have]
with open(folders(sys.argv[1]) + "/machine.pth", "w") as file:
    file.write("\n".join(lines) + "\n")
END
    packages=$("$folder/env/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    "$python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile \
        --no-index --no-deps --target "$packages" "$wheels"/*.whl
    python=$folder/env/bin/python
fi

out=$1
shift
case $out in -*) set -- "$out" "$@" ;; /*) set -- "$out" "$@" ;; *) set -- "$PWD/$out" "$@" ;; esac
cd "$root"
"$python" -m benchmarks.gpu_check "$@"
