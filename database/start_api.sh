#!/bin/sh
# Starts the architecture database in the foreground, from any folder; SIGTERM and Ctrl-C reach the server itself.
#   database/start_api.sh [--port P] [--store URL]     takes every flag of mongodb_api.py
#   database/start_api.sh --mongodb [--port P]         over the MongoDB of docker-compose.yml, which is started first
# Without --store, --config, --mongodb and ASI_DATABASE__STORE: that MongoDB where .env sets MONGODB_PASSWORD, otherwise
# the file database.sqlite of the repository.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd)
root=$(dirname -- "$here")
env_file=$root/.env
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3

stop() {
    printf 'error: %s\n  fix: %s\n' "$1" "$2" >&2
    exit 2
}

# The value of a variable as docker compose sees it: of the environment, else of .env.
variable() {
    eval "value=\${$1:-}"
    if [ -z "$value" ] && [ -f "$env_file" ]; then
        value=$(sed -n "s/^$1=//p" "$env_file" | tail -n 1)
    fi
    printf %s "$value"
}

listens() {
    "$python" -c 'import socket, sys; socket.create_connection(("127.0.0.1", int(sys.argv[1])), 2)' "$1" 2>/dev/null
}

start_mongodb() {
    if ! listens "$1"; then
        docker compose version >/dev/null 2>&1 ||
            stop "nothing listens on port $1, and docker compose, which would start MongoDB, does not work here" \
                "install docker with its compose plugin, start a MongoDB on that port, or choose --store sqlite:///FILE"
        set --
        [ ! -f "$env_file" ] || set -- --env-file "$env_file"
        docker compose "$@" -f "$here/docker-compose.yml" up --detach --wait mongodb
    fi
}

over_mongodb() {
    password=$(variable MONGODB_PASSWORD)
    case $password in
    '') stop "expected MONGODB_PASSWORD in $env_file or in the environment" "cp .env.example .env, and fill it in" ;;
    *[!A-Za-z0-9]*) stop "expected MONGODB_PASSWORD to be of letters and digits" "openssl rand -hex 24 prints one" ;;
    esac
    port=$(variable MONGODB_PORT)
    port=${port:-27018}
    start_mongodb "$port"
    # By the environment: every user of this machine may read a command line.
    export ASI_DATABASE__STORE="mongodb://asi:$password@127.0.0.1:$port/myapp?authSource=admin"
}

chosen=${ASI_DATABASE__STORE:-}
for argument in "$@"; do
    case $argument in
    --store | --store=* | --database.store | --database.store=* | --config | --config=* | -h | --help) chosen=$argument ;;
    esac
done

if [ "${1:-}" = --mongodb ]; then
    shift
    over_mongodb
elif [ -z "$chosen" ] && [ -n "$(variable MONGODB_PASSWORD)" ]; then
    echo "start_api: over MongoDB, since MONGODB_PASSWORD is set; --store chooses another store" >&2
    over_mongodb
elif [ -z "$chosen" ]; then
    export ASI_DATABASE__STORE="sqlite:///$root/database.sqlite"
fi
exec "$python" "$here/mongodb_api.py" "$@"
