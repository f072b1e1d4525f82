# syntax=docker/dockerfile:1
# A server on a CPU. Its default command serves the embedded demo model.
# Build it from the root of the repository:
#   docker build -f deploy/cpu.Dockerfile -t sglang-dllm:cpu .

FROM python:3.12-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY python python
COPY patches patches
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.12-slim
ARG SGLANG_VERSION=0.5.23
# torch of this index has no CUDA libraries, which are several gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" "sglang==$SGLANG_VERSION"
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir --no-deps /dist/*.whl \
    && ln -s "$(python -m sglang_dllm demo-path)" /opt/demo

# The root file system may be read-only: all that is written goes to /tmp.
ENV HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# A number, so that Kubernetes can check runAsNonRoot; group 0, as OpenShift wants it.
USER 10001:0
WORKDIR /tmp
EXPOSE 8080
ENTRYPOINT ["sglang", "serve"]
CMD ["--model-path", "/opt/demo", "--served-model-name", "demo", "--dllm-algorithm", "FullAttnMultiBlock", "--host", "0.0.0.0", "--port", "8080"]
