# Two images: `serve`, the last stage and so the default, and `train`, that of `docker compose --profile train run train`.
# Wheels, pip and the compiler stay behind in the stages that build. Why it is so: ADR 12.
# PYTHON_IMAGE     the base; pin it by digest where a registry can be asked: python:3.11-slim-bookworm@sha256:...
# TORCH_INDEX_URL  where torch comes from; the default is its CPU build, empty is pip's own index (the CUDA build)
# TORCH_SHA256     the one wheel of torch that is taken; empty takes what the index has, and prints its sum
# DEBIAN_PACKAGES  Debian packages for the image: for CUDA a C compiler, with which Triton makes the engine's kernels
# WHEELS_IMAGE     an image with *.whl in its root, looked at before any index; for builds without a network, which take a
#                  PYTHON_IMAGE that has gcc
# REVISION         the commit, for a label
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG WHEELS_IMAGE=scratch

FROM ${WHEELS_IMAGE} AS wheels
# Gives the stage a file system where it would be empty, so that it can be mounted below.
WORKDIR /wheels

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
# Without pip: in it is what serves, and nothing else.
RUN python -m venv --without-pip /opt/venv
WORKDIR /build
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG TORCH_SHA256=
COPY requirements/torch.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    pip --python /opt/venv/bin/python download --no-deps --only-binary :all: --find-links /wheels --dest /build/torch \
        ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} --requirement torch.txt \
 && sha256sum /build/torch/*.whl \
 && if [ -n "$TORCH_SHA256" ]; then \
        echo "$TORCH_SHA256 " /build/torch/*.whl > torch.sha256 && sha256sum --check --strict torch.sha256; fi \
 && pip --python /opt/venv/bin/python install --no-deps --no-index /build/torch/*.whl \
 && rm -r /build/torch /opt/venv/lib/python*/site-packages/torch/include /opt/venv/lib/python*/site-packages/torch/test
# Every file but torch's is known by its sum; nothing is compiled, so nothing runs while it is installed.
COPY requirements/serve.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    pip --python /opt/venv/bin/python install --no-deps --require-hashes --only-binary :all: --requirement serve.txt
# What this build of torch asks for beyond the lock: nothing for the CPU, NVIDIA's libraries in its exact versions for CUDA.
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    pip --python /opt/venv/bin/python install --only-binary :all: --requirement torch.txt \
 && pip --python /opt/venv/bin/python check

# For the engine's own C; behind what the service stands on, which is not installed again for its sake.
FROM build AS compiler
# hadolint ignore=DL3008
RUN command -v gcc \
 || { apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -r /var/lib/apt/lists/*; }

# pip goes on without what does not compile. An image does not: `ls` fails.
FROM compiler AS build-serve
COPY pyproject.toml LICENSE README.md ./
COPY app app
RUN pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --no-index --no-build-isolation \
        --target /opt/precis . \
 && ls /opt/precis/app/engine/cpu_kernels/_avx2.*.so \
 && ls /opt/precis/app/engine/cpu_kernels/_avx512.*.so

# rouge-score has no wheel: it is built here by the setuptools of the lock.
FROM compiler AS build-train
COPY requirements/train.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    pip --python /opt/venv/bin/python install --no-deps --require-hashes --no-build-isolation \
        --only-binary :all: --no-binary rouge-score --requirement train.txt \
 && pip --python /opt/venv/bin/python check
COPY pyproject.toml LICENSE README.md ./
COPY app app
COPY train train
RUN pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --no-index --no-build-isolation \
        --target /opt/precis . \
 && ls /opt/precis/app/engine/cpu_kernels/_avx2.*.so \
 && ls /opt/precis/app/engine/cpu_kernels/_avx512.*.so

FROM ${PYTHON_IMAGE} AS runtime
ARG DEBIAN_PACKAGES=
# hadolint ignore=DL3008,SC2086
RUN if [ -n "$DEBIAN_PACKAGES" ]; then \
        apt-get update && apt-get install --yes --no-install-recommends $DEBIAN_PACKAGES && rm -r /var/lib/apt/lists/*; fi
RUN groupadd --gid 10001 precis \
 && useradd --uid 10001 --gid precis --no-create-home --home-dir /tmp --shell /usr/sbin/nologin precis
# Nothing is written at run time but what goes to /tmp (and Triton's kernels); a hub model is cached there too.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/precis \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /srv
USER 10001:10001
ARG REVISION=
LABEL org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"

FROM runtime AS train
LABEL org.opencontainers.image.title="precis-train" \
      org.opencontainers.image.description="Fine-tunes, exports and evaluates the models that precis serves"
COPY --from=build-train /opt/venv /opt/venv
COPY --from=build-train /opt/precis /opt/precis
# See `make train`.
ENV MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
ENTRYPOINT ["python", "-m", "train"]

FROM runtime AS serve
LABEL org.opencontainers.image.title="precis" \
      org.opencontainers.image.description="Summarisation server"
# Two layers: a change of code does not ship torch again.
COPY --from=build /opt/venv /opt/venv
COPY --from=build-serve /opt/precis /opt/precis
ENV PRECIS_HOST=0.0.0.0 \
    PRECIS_PORT=8000 \
    PRECIS_MODEL_STORE=/srv/model_store
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --start-interval=2s --retries=3 \
    CMD ["python", "-m", "app.healthcheck"]
# SageMaker adds the argument `serve`.
ENTRYPOINT ["python", "-m", "app"]
