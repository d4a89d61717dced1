# prts on Python's image, as root:
#   docker build --tag prts .
#   docker run --rm --volume "$PWD:/data" prts predict bundle=model image=slide.svs out=slide.h5ad
# A GPU is used with `docker run --gpus all`. A smaller image for CPUs, and more than `prts predict` and `prts export`:
#   docker build --tag prts --build-arg EXTRAS=train,report,analysis --build-arg PIP_EXTRA_INDEX_URL=<index of PyTorch's CPU builds> .
ARG BASE=python:3.11-slim
FROM ${BASE}

ARG EXTRAS=report
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /opt/prts
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY prts prts
COPY configs configs
RUN python3 -m venv /opt/venv
RUN /opt/venv/bin/python -m pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"
RUN /opt/venv/bin/prts doctor

ENV PATH=/opt/venv/bin:$PATH \
    PRTS_CACHE=/data/cache \
    PRTS_DATA=/data
WORKDIR /data
ENTRYPOINT ["prts"]
CMD ["--help"]
