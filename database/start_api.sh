#!/bin/sh
# Starts the architecture database in the foreground, from any folder:
#   database/start_api.sh [--port P] [--store sqlite:///FILE]     over SQLite
#   database/start_api.sh --mongodb [--port P]                    over the MongoDB of docker-compose.yml, which it starts too
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$(dirname -- "$here")
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3

if [ "${1:-}" = "--mongodb" ]; then
    shift
    docker compose -f "$here/docker-compose.yml" up --detach --wait mongodb
    set -- --store "mongodb://127.0.0.1:${MONGODB_PORT:-27018}/myapp" "$@"
fi
exec "$python" "$here/mongodb_api.py" "$@"
