# The worker's image: build with `docker build -t heimdex-clip-worker .`
# The CUDA libraries come with PyTorch's wheels, so the base needs nothing but Python.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm
FROM ${BASE_IMAGE}

ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/home/worker/.cache/huggingface

WORKDIR /app

# First what changes least: every version pinned, with its hash.
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt

COPY settings.ini setup.py pyproject.toml README.md LICENSE ./
COPY heimdex_clip_worker ./heimdex_clip_worker
RUN pip install --no-cache-dir --no-build-isolation --no-deps . \
    && rm -rf /app/* \
    && useradd --create-home --uid 10001 worker

USER worker
WORKDIR /home/worker

CMD ["python", "-u", "-m", "heimdex_clip_worker.handler"]
