# One image for the API, the workers, beat and the services; they differ by their command.

FROM python:3.13-slim AS builder

# Without pip inside: the final image has no use for it.
RUN python -m venv --without-pip /opt/venv
COPY requirements.txt /tmp/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --requirement /tmp/requirements.txt

# Compiled here, since the running container writes nothing. The source cannot change under it, so it is not checked.
COPY app /srv/app
RUN python -m compileall -q --invalidation-mode unchecked-hash /srv/app


FROM python:3.13-slim

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN groupadd --gid 10001 app && useradd --uid 10001 --gid app --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin app
WORKDIR /srv
COPY deploy/healthcheck.sh /usr/local/bin/healthcheck
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /srv/app app
USER app

EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=6 CMD ["healthcheck"]
CMD ["uvicorn", "app.main:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000", \
     "--http", "app.api.protocol:OneWriteProtocol", "--no-access-log", "--no-proxy-headers", "--no-server-header", \
     "--timeout-keep-alive", "75", "--timeout-graceful-shutdown", "20", "--backlog", "2048"]
