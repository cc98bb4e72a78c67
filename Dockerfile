# The worker's image: `docker build -t heimdex-clip-worker .`, or the same with buildah.
#
# The base needs Python 3.10 or later with venv, and nothing else: PyTorch's wheels bring their own
# CUDA libraries. Pin a digest where builds must repeat to the byte:
# `--build-arg BASE_IMAGE=python@sha256:...`.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm

# A tag of open_clip's, or a checkpoint in weights/ where the model hub cannot be reached.
ARG CLIP_MODEL_NAME=ViT-B-32
ARG CLIP_PRETRAINED=openai
ARG CLIP_ACTIVATION=auto


# Python with its library compiled: the official image has no bytecode, and a worker that may not
# write would compile the same modules at every start. Hashed, so that no time stamp matters.
FROM ${BASE_IMAGE} AS python
RUN python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash \
        "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
        -x 'site-packages|dist-packages|/test/|lib2to3|idlelib' \
    && useradd --create-home --uid 10001 worker


# Every package in the lock, by its hash. Changes only with requirements.txt.
FROM python AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY requirements.txt /build/
RUN pip install --quiet -r /build/requirements.txt


# What the worker runs on: no pip, no compilers of kernels, headers or tests. Triton and CUDA's
# Python bindings serve torch.compile alone, which is not used.
FROM packages AS runtime
RUN pip uninstall --quiet --yes triton cuda-bindings cuda-pathfinder setuptools pip \
    && cd /opt/venv/lib/python3*/site-packages \
    && rm -rf torch/include torch/bin nvidia/*/include nvidia/nvshmem/lib/*.a \
    && find . -type d \( -name tests -o -name test -o -name __pycache__ \) -prune -exec rm -rf {} + \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash . \
    && rm -f /opt/venv/bin/*ctivate*


# The weights, fetched by open_clip's own loader. Changes only with these files and arguments.
FROM runtime AS checkpoint
ARG CLIP_MODEL_NAME
ARG CLIP_PRETRAINED
ARG CLIP_ACTIVATION
WORKDIR /build
COPY weights ./weights
COPY heimdex_clip_worker/__init__.py heimdex_clip_worker/errors.py heimdex_clip_worker/weights.py \
     ./heimdex_clip_worker/
RUN python -c 'import sys; from heimdex_clip_worker.weights import load_model; load_model(*sys.argv[1:])' \
        "$CLIP_MODEL_NAME" "$CLIP_PRETRAINED" "$CLIP_ACTIVATION"
