#!/usr/bin/env bash
# Makes the virtual environment: bash tools/setup.sh PYTHON VENV
# Installs the pinned requirements with uv, byte-compiles what is imported most (PyTorch starts twice as fast so), and, as root
# on Debian, installs bubblewrap where it is missing.
set -euo pipefail
python=$1 venv=$2
began=$(date +%s)

"$python" - <<'CHECK' || exit 2
import sys
if sys.version_info < (3, 11):
    sys.exit(f"error: expected Python 3.11 or newer, got {sys.version.split()[0]}\n  fix: make setup PYTHON=/path/to/python3.11")
CHECK

# Where byte-compilation is switched off, imports take two to four times as long in every child process.
unset PYTHONDONTWRITEBYTECODE

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    echo "setup: making $venv"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
if [ ! -x "$venv/bin/uv" ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
fi
echo "setup: installing the pinned packages (about 3 GB to download the first time)"
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" -r requirements.txt -r requirements-dev.txt

echo "setup: byte-compiling"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
packages=()
for name in torch triton transformers lm_eval datasets einops numpy sympy networkx faiss scipy sklearn pandas tokenizers \
    safetensors huggingface_hub pyarrow fsspec requests urllib3 chardet charset_normalizer idna dateutil multiprocess dill \
    filelock sacrebleu portalocker tqdm yaml fastapi starlette uvicorn anyio h11 click limits prometheus_client pymongo bson \
    pydantic pydantic_core pydantic_settings pydantic_ai pydantic_graph griffe openai aiohttp attr opentelemetry httpx httpcore \
    flask werkzeug waitress opensearchpy docker datasketch rich pygments matplotlib mpl_toolkits PIL pyparsing fontTools mpmath \
    jinja2 _pytest pluggy xdist execnet hypothesis; do
    [ -d "$site/$name" ] && packages+=("$site/$name")
done
"$venv/bin/python" -m compileall -q -j 0 "${packages[@]}" >/dev/null 2>&1 || true

if [ "$(uname -s)" = Linux ] && ! command -v bwrap >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing bubblewrap"
        { apt-get update -q && apt-get install -y -q bubblewrap; } >"$venv/bubblewrap.log" 2>&1 ||
            echo "setup: bubblewrap could not be installed (see $venv/bubblewrap.log); the limited process is used instead"
    else
        echo "setup: bubblewrap is missing; with it candidate code runs without network and files: sudo apt-get install bubblewrap"
    fi
fi
echo $(($(date +%s) - began)) >"$venv/setup-seconds"
touch "$venv/ready"
echo "setup: done in $(cat "$venv/setup-seconds") s"
