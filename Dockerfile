# The whole artifact in an image: `docker run -v "$PWD/results:/home/mango/mango/results" mango` regenerates the paper into ./results.
#
#   docker build -t mango .                                                                         Debian, torch as pip finds it
#   docker build -t mango --build-arg BASE_IMAGE=nvidia/cuda:12.8.1-runtime-ubuntu22.04 .           NVIDIA GPUs (run with --gpus all)
#
# The mounted folder must be writable by user 1000 (--build-arg UID=$(id -u) for another).
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}

ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates git make python3.11 python3.11-venv \
        texlive-latex-recommended texlive-latex-extra texlive-fonts-recommended texlive-science lmodern latexmk \
    && rm -rf /var/lib/apt/lists/*

ARG UID=1000
RUN useradd --create-home --uid ${UID} mango && install -d -o mango -g mango /home/mango/mango
USER mango
WORKDIR /home/mango/mango

# The packages first: editing the library does not install them again.
COPY --chown=mango requirements.lock ./
RUN python3.11 -m venv .venv && .venv/bin/python -m pip install --no-cache-dir -r requirements.lock

COPY --chown=mango . ./
RUN make setup

ENV PATH=/home/mango/mango/.venv/bin:${PATH}
CMD ["bash", "-c", "make paper && cp paper/build/mango.pdf report.html results/laptop/"]
