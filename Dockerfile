# Two stages: wheels and compilers stay behind in the first one. Built by `docker compose build`.
# TORCH_INDEX_URL  where torch comes from; the default is its CPU build, empty is pip's own index (the CUDA build)
# WHEELS_IMAGE     an image with *.whl in its root, looked at before any index; for builds without a network
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG WHEELS_IMAGE=scratch

FROM ${WHEELS_IMAGE} AS wheels
# Gives the stage a file system where it would be empty, so that it can be mounted below.
WORKDIR /wheels

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
RUN python -m venv /opt/venv
WORKDIR /build
# Dependencies before code: a change of code does not download torch again.
COPY pyproject.toml ./
RUN --mount=type=bind,from=wheels,target=/wheels <<'SH'
set -eu
python - <<'PY' > requirements.txt
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")
PY
/opt/venv/bin/pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} --find-links /wheels \
    "$(grep '^torch==' requirements.txt)"
/opt/venv/bin/pip install --find-links /wheels -r requirements.txt
SH
COPY LICENSE README.md ./
COPY app app
RUN /opt/venv/bin/pip install --no-deps .

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="precis" \
      org.opencontainers.image.description="Summarisation server" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 precis && useradd --uid 10001 --gid precis --no-create-home --shell /usr/sbin/nologin precis
COPY --from=build /opt/venv /opt/venv
# Nothing is written at run time but what goes to /tmp; a hub model is cached there too.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    PRECIS_HOST=0.0.0.0 \
    PRECIS_PORT=8000 \
    PRECIS_MODEL_STORE=/srv/model_store
WORKDIR /srv
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['PRECIS_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "app"]
