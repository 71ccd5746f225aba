# What a cluster runs: head and workers use this one image, so that every process has the same code and versions.
# g++ compiles the engine's kernel for the processor it finds, at first use.
# On Linux PyPI's torch carries CUDA; for a CPU image build with --build-arg TORCH_INDEX=<PyTorch's CPU index>.
FROM python:3.11.14-slim-bookworm

ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token

RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ procps wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 ray

WORKDIR /home/ray/nanochat-ray
COPY constraints.txt ./
RUN version=$(sed -n 's/^torch==//p' constraints.txt) \
 && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$version"
COPY pyproject.toml README.md LICENSE ./
COPY nanochat nanochat
COPY pipelines pipelines
COPY cluster cluster
RUN pip install --constraint constraints.txt --editable .

USER ray
CMD ["nanochat", "--help"]
