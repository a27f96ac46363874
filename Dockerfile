# syntax=docker/dockerfile:1
# docker build --target cpu -t posterior-server:cpu .    docker run -p 8000:8000 -e POSTERIOR_API_KEY=... posterior-server:cpu
# docker build --target cuda -t posterior-server:cuda .  docker run --gpus all -p 8000:8000 -e POSTERIOR_API_KEY=... posterior-server:cuda
# A container listens on every address, so the server starts only with POSTERIOR_API_KEY or POSTERIOR_KEYS. Mount a volume
# at /cache to keep converted models; mount your own base and posteriors anywhere and add: serve --host 0.0.0.0 --base ...
# --posteriors ...
ARG PYTHON=python:3.11.14-slim-bookworm
# devel: vLLM compiles kernels with nvcc at run time
ARG CUDA=nvidia/cuda:13.0.2-devel-ubuntu24.04

FROM ${PYTHON} AS base-cpu
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 posterior && install -d -o posterior /cache

FROM ${CUDA} AS base-cuda
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 python3-dev python3-venv && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 posterior && install -d -o posterior /cache

# The same tools/setup as on any machine, without checks and tests; all byte code, as a container cannot write it later. Some
# packages carry templates that are no Python.
FROM base-cpu AS build-cpu
WORKDIR /app
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip STACK=cpu DEV=0 tools/setup \
    && { .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null || true; }

FROM base-cuda AS build-cuda
WORKDIR /app
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip STACK=cuda DEV=0 tools/setup \
    && { .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null || true; }

FROM base-cpu AS cpu
COPY --from=build-cpu /app /app
ENV PATH=/app/.venv/bin:$PATH POSTERIOR_CACHE=/cache HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
USER posterior
WORKDIR /home/posterior
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["posterior"]
CMD ["serve", "--host", "0.0.0.0"]

FROM base-cuda AS cuda
COPY --from=build-cuda /app /app
ENV PATH=/app/.venv/bin:$PATH POSTERIOR_CACHE=/cache HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1 \
    VLLM_CACHE_ROOT=/cache/vllm TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor
USER posterior
WORKDIR /home/posterior
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["posterior"]
CMD ["serve", "--host", "0.0.0.0"]
