# The worker, and `sample`, with libtorch from the pinned PyPI wheels. From the repository's root:
#
#   docker build -f deploy/images/worker.Dockerfile -t peapod-worker .                                    CUDA, about 5 GB
#   docker build -f deploy/images/worker.Dockerfile -t peapod-worker:cpu --build-arg VARIANT=cpu .        CPU only, with the demo's model and data
#
# From programs and a libtorch that are there already (for the same or an older glibc), in dist/ and dist/libtorch/:
#
#   docker build -f deploy/images/worker.Dockerfile -t peapod-worker --build-arg BUILDER=debian:bookworm-slim \
#     --build-arg PROGRAMS=dist --build-arg LIBTORCH=dist/libtorch .

ARG BUILDER=rust:1.89-bookworm
# A Debian or an Ubuntu, for CUDA.
ARG BASE=debian:bookworm-slim

FROM ${BUILDER} AS build
ARG VARIANT=cuda
# A folder of the build context with torch/ and nvidia/ in it; empty: they are installed.
ARG LIBTORCH=
WORKDIR /src
# First what seldom changes and takes long.
COPY deploy deploy
COPY ${LIBTORCH:-deploy/setup} /given/
RUN deploy/images/assemble.sh libtorch "${VARIANT}" "${LIBTORCH:+/given}"
# A folder of the build context with the programs in it; empty: they are built here.
ARG PROGRAMS=
# For `--version`: --build-arg PEAPOD_COMMIT=$(git rev-parse HEAD)
ARG PEAPOD_COMMIT
# Of what is built here: aws,gcp,azure for stores, otlp for spans
ARG FEATURES=
COPY . .
RUN deploy/images/assemble.sh worker "${VARIANT}" "${PROGRAMS}"

FROM ${BASE}
ARG VARIANT=cuda
# What NCCL loads to speak to InfiniBand and RoCE adapters. Without it, it takes sockets.
RUN if [ "${VARIANT}" = cuda ]; then \
      apt-get update -q && apt-get install -qy --no-install-recommends libibverbs1 ibverbs-providers && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=build /out/libtorch/ /
COPY --from=build /out/programs/ /
ENV PATH=/opt/peapod/bin:/usr/local/bin:/usr/bin:/bin \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    HF_HOME=/models \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Paths in a job file are relative to this.
WORKDIR /opt/peapod
USER 10001:10001
# In exec form the program is process 1, and SIGTERM arrives at it: it leaves after the step in flight.
ENTRYPOINT ["/opt/peapod/bin/worker"]
