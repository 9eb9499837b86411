# A server of one model, from the locked versions.
#
#     docker build -t mosaicjax .
#     docker run --rm -p 8000:8000 -v "$PWD/hf/mine:/model:ro" --env-file keys.env mosaicjax
#
# keys.env has a line MOSAICJAX_API_KEYS=KEY,KEY: a server that other machines reach needs one. What follows the
# image's name is added to `mosaicjax serve /model`. On a TPU machine: --build-arg EXTRAS=serve,tpu, and run it
# with --privileged --net host -e JAX_PLATFORMS=tpu.

FROM python:3.12-slim AS build
ARG EXTRAS=serve
WORKDIR /src
COPY locks/py312.txt locks/
COPY pyproject.toml README.md LICENSE ./
COPY mosaicjax mosaicjax
# The lock has more than a server needs: it says which versions, the extra which libraries.
RUN python -m venv /opt/mosaicjax \
    && PIP_CONSTRAINT=/src/locks/py312.txt /opt/mosaicjax/bin/pip install --no-cache-dir ".[${EXTRAS}]"

FROM python:3.12-slim
RUN useradd --system --uid 10001 --create-home --home-dir /home/server server
COPY --from=build /opt/mosaicjax /opt/mosaicjax
ENV PATH=/opt/mosaicjax/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    JAX_PLATFORMS=cpu \
    JAX_COMPILATION_CACHE_DIR=/home/server/.cache/jax
USER server
WORKDIR /home/server
EXPOSE 8000
# Warming up compiles the model's programs, which takes minutes for large ones.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["mosaicjax", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
