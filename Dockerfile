# syntax=docker/dockerfile:1
# docker build --target cpu -t posterior-server:cpu .    docker run -p 8000:8000 -e POSTERIOR_API_KEY=... posterior-server:cpu
# docker build --target cuda -t posterior-server:cuda .  docker run --gpus all -p 8000:8000 -e POSTERIOR_API_KEY=... posterior-server:cuda
# Inside a container the server listens on every address, so it starts only with POSTERIOR_API_KEY. /cache keeps converted models:
# mount a volume there to keep them. The base and the posteriors of your own are mounted and named by --base and --posteriors.
ARG PYTHON=python:3.11.14-slim-bookworm
ARG CUDA=nvidia/cuda:13.0.2-devel-ubuntu24.04

# What both images run: the same tools/setup as on any machine, without checks and tests.
FROM ${PYTHON} AS build-cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip STACK=cpu DEV=0 tools/setup /app/.venv

FROM ${CUDA} AS build-cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip STACK=cuda DEV=0 tools/setup /app/.venv

# The compilers stay out of the CPU image but for g++, with which torch compiles kernels at run time.
FROM ${PYTHON} AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 posterior && install -d -o posterior /cache
COPY --from=build-cpu /app /app
ENV PATH=/app/.venv/bin:$PATH POSTERIOR_CACHE=/cache HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
USER posterior
WORKDIR /home/posterior
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["posterior"]
CMD ["serve", "--host", "0.0.0.0"]

# vLLM compiles kernels with nvcc at run time, hence the devel image.
FROM ${CUDA} AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 posterior && install -d -o posterior /cache
COPY --from=build-cuda /app /app
ENV PATH=/app/.venv/bin:$PATH POSTERIOR_CACHE=/cache HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
USER posterior
WORKDIR /home/posterior
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["posterior"]
CMD ["serve", "--host", "0.0.0.0"]
