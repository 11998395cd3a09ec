# acestep-ray for every node of a Ray cluster, and for one machine.
#
#   docker build --tag acestep-ray:0.1.0-cpu .
#   docker build --tag acestep-ray:0.1.0-cuda --build-arg VARIANT=cuda .
#
# docs/deploy.md says how to run it. To pin another base: `docker buildx imagetools inspect IMAGE:TAG` shows its digest.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d
ARG VARIANT=cpu


# The list of dependencies alone: a change of anything else in pyproject.toml installs nothing anew.
FROM ${PYTHON_IMAGE} AS requirements
# Extras of pyproject.toml, with commas between them.
ARG EXTRAS=s3,gcs,search
WORKDIR /build
COPY pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['dependencies'], *(each for extra in '${EXTRAS}'.split(',') if extra for each in project['optional-dependencies'][extra]), sep='\n')" > requirements.txt


FROM ${PYTHON_IMAGE} AS wheel
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY acestep_ray acestep_ray
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .


# What both variants share: an init process that passes signals on, a user, and where things lie.
FROM ${PYTHON_IMAGE} AS system
# Debian keeps no older releases of a package, so that a pinned one would soon be gone.
# hadolint ignore=DL3008,SC2016
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 ray \
    && useradd --uid 10001 --gid ray --create-home --shell /bin/bash ray \
    # KubeRay may start Ray in a login shell, which begins with a PATH of its own.
    && echo 'export PATH=/opt/acestep/bin:$PATH' > /etc/profile.d/acestep.sh
ENV PATH=/opt/acestep/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0

FROM system AS system-cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu

FROM system AS system-cuda
# CUDA comes with torch, the driver from the host. Triton compiles each kernel's launcher where it runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV TORCH_INDEX=https://pypi.org/simple \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility


# hadolint ignore=DL3006
FROM system-${VARIANT} AS dependencies
# Every node, and the `rayVersion` of cluster/kuberay, must have this Ray.
ARG RAY_VERSION=2.60.0
ARG TORCH_VERSION=2.11.0
RUN python -m venv /opt/acestep
# Apart, for a shell remembers where it found `python`.
# hadolint ignore=DL3059
RUN python -m pip install --no-cache-dir --index-url "${TORCH_INDEX}" \
    "torch==${TORCH_VERSION}" "torchaudio==${TORCH_VERSION}"
COPY --from=requirements /build/requirements.txt /opt/acestep/requirements.txt
RUN python -m pip install --no-cache-dir --requirement /opt/acestep/requirements.txt \
    "ray==${RAY_VERSION}" "torch==${TORCH_VERSION}" "torchaudio==${TORCH_VERSION}"


FROM dependencies AS runtime
LABEL org.opencontainers.image.title="acestep-ray" \
      org.opencontainers.image.description="Training for the ACE-Step v1 music model on Ray" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python -m pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
COPY pipelines /opt/acestep/pipelines
COPY lora_config.json LICENSE NOTICE /opt/acestep/

USER 10001:10001
WORKDIR /home/ray

# Of a node: its agent answers for the raylet, and on the head for the GCS too. A container that only runs a command
# has no agent: start it with --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('RAY_AGENT_PORT', '52365') + '/api/healthz', timeout=8)"]

# Training saves its last step on SIGTERM, and `ray start --block` ends its node.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["acestep-ray", "--help"]
