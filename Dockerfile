# The worker's image: `docker build -t heimdex-clip-worker .`, or the same with buildah.
#
# The base needs Python 3.10 or later with venv, and nothing else: PyTorch's wheels bring their own
# CUDA libraries. The digest is that of the index for all architectures; the tag is for readers.
# `.github/workflows/base.yml` proposes newer ones.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

# A tag of open_clip's, or a checkpoint in weights/ where the model hub cannot be reached.
ARG CLIP_MODEL_NAME=ViT-B-32
ARG CLIP_PRETRAINED=openai
ARG CLIP_ACTIVATION=auto
# The sha256 of the checkpoint. Empty: what `model/weights.py` pins for a tag, and any file by path.
ARG CLIP_SHA256=


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
    && rm -rf torch/include nvidia/*/include \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && find . -type f \( -name '*.a' -o -name '*.h' \) -delete \
    && find . -type d \( -name tests -o -name test -o -name __pycache__ \) -prune -exec rm -rf {} + \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash . \
    && rm -f /opt/venv/bin/*ctivate* \
    && python -c 'import open_clip, torch, torchvision'


# The weights, fetched by open_clip's own loader; a file with another digest than the pinned one
# ends the build. Changes only with these files and arguments.
FROM runtime AS checkpoint
ARG CLIP_MODEL_NAME
ARG CLIP_PRETRAINED
ARG CLIP_ACTIVATION
ARG CLIP_SHA256
WORKDIR /build
COPY weights ./weights
COPY heimdex_clip_worker/__init__.py heimdex_clip_worker/errors.py ./heimdex_clip_worker/
COPY heimdex_clip_worker/model/__init__.py heimdex_clip_worker/model/weights.py ./heimdex_clip_worker/model/
RUN python -c 'import sys; from heimdex_clip_worker.model.weights import load_pinned; load_pinned(*sys.argv[1:])' \
        "$CLIP_MODEL_NAME" "$CLIP_PRETRAINED" "$CLIP_ACTIVATION" "$CLIP_SHA256"


# The weights as they will be served, proved against open_clip. A change of the package's `model`
# repeats this stage, with the same bytes as result; other code is not copied here.
FROM checkpoint AS weights
ARG CLIP_MODEL_NAME
ARG CLIP_PRETRAINED
ARG CLIP_ACTIVATION
ARG CLIP_SHA256
COPY heimdex_clip_worker/model ./heimdex_clip_worker/model
COPY heimdex_clip_worker/photos ./heimdex_clip_worker/photos
RUN HF_HUB_OFFLINE=1 python -m heimdex_clip_worker.model.artifact --to /opt/clip \
        --model-name "$CLIP_MODEL_NAME" --pretrained "$CLIP_PRETRAINED" --activation "$CLIP_ACTIVATION" \
        --sha256 "$CLIP_SHA256"


# This package, with the commands that come with it.
FROM packages AS worker
COPY settings.ini setup.py pyproject.toml README.md LICENSE /build/
COPY heimdex_clip_worker /build/heimdex_clip_worker
RUN pip install --quiet --no-build-isolation --no-deps --target /opt/worker /build \
    && python -m compileall -q --invalidation-mode unchecked-hash /opt/worker


# What is shipped: Python, packages, weights and code, each a layer, in the order in which they change.
FROM python
COPY --from=runtime /opt/venv /opt/venv
COPY --from=weights /opt/clip /opt/clip
COPY --from=worker /opt/worker /opt/worker
ARG CLIP_MODEL_NAME
ARG CLIP_PRETRAINED
ARG CLIP_ACTIVATION
# Nothing is fetched or written at run time: the weights are in CLIP_ARTIFACT_DIR. NVIDIA's container
# runtime mounts a driver only into an image that asks for it, as CUDA's own base images do.
ENV PATH=/opt/venv/bin:/opt/worker/bin:$PATH \
    PYTHONPATH=/opt/worker \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HUB_OFFLINE=1 \
    CLIP_ARTIFACT_DIR=/opt/clip \
    CLIP_MODEL_NAME=$CLIP_MODEL_NAME \
    CLIP_PRETRAINED=$CLIP_PRETRAINED \
    CLIP_ACTIVATION=$CLIP_ACTIVATION
USER worker
WORKDIR /home/worker
CMD ["python", "-u", "-m", "heimdex_clip_worker.handler"]
