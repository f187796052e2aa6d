# The coordinator: one program, no libtorch. From the repository's root:
#
#   docker build -f deploy/images/coordinator.Dockerfile -t peapod-coordinator .
#
# From a program that is built already (for the same or an older glibc), in dist/:
#
#   docker build -f deploy/images/coordinator.Dockerfile -t peapod-coordinator --build-arg BUILDER=debian:bookworm-slim --build-arg PROGRAMS=dist .

ARG BUILDER=rust:1.89-bookworm
ARG BASE=gcr.io/distroless/cc-debian12

FROM ${BUILDER} AS build
# A folder of the build context with the program in it; empty: it is built here.
ARG PROGRAMS=
# For `--version`: --build-arg PEAPOD_COMMIT=$(git rev-parse HEAD)
ARG PEAPOD_COMMIT
# Of what is built here: aws,gcp,azure for stores, otlp for spans
ARG FEATURES=
WORKDIR /src
COPY . .
RUN deploy/images/assemble.sh coordinator "${PROGRAMS}"

FROM ${BASE}
COPY --from=build /out/programs/ /
COPY --from=build --chown=10001:10001 /out/state /state
ENV PATH=/opt/peapod/bin:/usr/local/bin:/usr/bin:/bin \
    PEAPOD_STATE_DIR=/state \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
# Paths in a job file are relative to this.
WORKDIR /opt/peapod
USER 10001:10001
VOLUME /state
EXPOSE 7733 7734
# In exec form the program is process 1, and SIGTERM arrives at it.
ENTRYPOINT ["/opt/peapod/bin/coordinator"]
