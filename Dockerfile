# GILL with its service. CPU:   docker build -t gill .
#                        CUDA:  docker build -t gill:cuda --build-arg TORCH_BACKEND=cu130 .
# The versions are those of constraints.txt. docs/howto/container.md says how to run it.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# Which build of torch: cpu, cu126, cu128, cu130 ...; empty: the package registry's own.
ARG TORCH_BACKEND=cpu
# Of pyproject.toml; for example app,captions,s3.
ARG EXTRAS=app
RUN python -m pip install --no-cache-dir uv==0.13.9
WORKDIR /build
COPY . .
RUN python -m venv /opt/gill \
    && uv pip install --no-cache --python /opt/gill/bin/python --constraint constraints.txt \
       ${TORCH_BACKEND:+--torch-backend=${TORCH_BACKEND}} ".[${EXTRAS}]"

FROM python:${PYTHON}-slim
# DVC keeps experiments in git.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/gill /opt/gill
RUN useradd --create-home --uid 1000 gill && mkdir /work && chown gill /work
ENV PATH=/opt/gill/bin:$PATH \
    OMP_NUM_THREADS=1 \
    DVC_NO_ANALYTICS=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TOKENIZERS_PARALLELISM=false
USER gill
# Where artifacts/, params.yaml and inputs/ of the host are mounted.
WORKDIR /work
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Beyond this machine the service wants a key: -e GILL_API_KEY=...
CMD ["gill", "serve", "--host", "0.0.0.0", "--port", "8000"]
