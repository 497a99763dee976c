#!/usr/bin/env bash
# Validates every compose file with docker compose's own parser, a Go package: bash tools/compose_check/run.sh
# Needs Go 1.24 or newer; as root on a Debian whose packages have one, installs it where it is missing.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
oldest=1.24

# Whether version $1 is $oldest or newer.
suffices() { [ "$(printf '%s\n' "$oldest" "$1" | sort -V | head -n 1)" = "$oldest" ]; }

found_go() {
    local candidate version
    for candidate in go /usr/local/go/bin/go; do
        version=$("$candidate" env GOVERSION 2>/dev/null) || continue
        if suffices "${version#go}"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

if ! go=$(found_go); then
    offered=$(apt-cache policy golang-go 2>/dev/null | sed -n 's/^ *Candidate: *\([0-9]*:\)\{0,1\}//p') || true
    if [ "$(id -u)" = 0 ] && [[ "$offered" == [0-9]* ]] && suffices "$offered"; then
        echo "compose-check: installing Go"
        apt-get install -y -q golang-go >/dev/null
    fi
    go=$(found_go) || {
        echo "error: expected Go $oldest or newer, got $(go env GOVERSION 2>/dev/null || echo none)" >&2
        echo "  fix: install it from https://go.dev/dl (or your system's packages, where they have $oldest) and put it on the PATH" >&2
        exit 2
    }
fi

cd "$here"
"$go" test .
"$go" run . -env "$root/.env.example" "$root/docker-compose.yml" "$root/database/docker-compose.yml" \
    "$root/cognition_base/docker-compose.yml"
