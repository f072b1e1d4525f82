# syntax=docker/dockerfile:1
# A server on NVIDIA GPUs: SGLang's own image with our wheel in it.
# Build it from the root of the repository:
#   docker build -f deploy/gpu.Dockerfile -t sglang-dllm:gpu .

# One of the versions that pyproject.toml allows.
ARG SGLANG_VERSION=0.5.23

FROM python:3.12-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY python python
COPY patches patches
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM lmsysorg/sglang:v${SGLANG_VERSION}
# The base image has SGLang and all that we import. --no-deps leaves its torch alone.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
COPY --from=wheel /dist /dist
RUN python3 -m pip install --no-cache-dir --no-deps /dist/*.whl \
    && ln -s "$(python3 -m sglang_dllm demo-path)" /opt/demo

# The root file system may be read-only: compiled kernels and all else go to /tmp.
ENV HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# A number, so that Kubernetes can check runAsNonRoot; group 0, as OpenShift wants it.
USER 10001:0
WORKDIR /tmp
EXPOSE 8080
ENTRYPOINT ["python3", "-m", "sglang.launch_server"]
CMD ["--model-path", "/opt/demo", "--served-model-name", "demo", "--dllm-algorithm", "FullAttnMultiBlock", "--host", "0.0.0.0", "--port", "8080"]
