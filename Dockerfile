# The two commands of the README in a container, on processors or with CUDA.
#
#   docker build -t babyllama .                                   with CUDA, as PyPI's torch has it
#   docker build -t babyllama --build-arg TORCH_INDEX=URL .       torch from an index that pytorch.org
#                                                 names: for processors alone, a tenth of the size
#   docker run --rm -it -v ./out:/app/out -v ./data:/app/data babyllama python quickstart.py
#   docker run --rm -it babyllama                                 talk to the released model
#   docker run --rm -it --gpus all -p 8000:8000 -v ./key.txt:/app/key.txt babyllama \
#       python -m serve.server release --host 0.0.0.0 --api-key-file key.txt
#
# gcc and Python's headers are what int8 kernels, torch.compile and block attention compile with.
FROM python:3.11-slim-bookworm
ARG TORCH_INDEX=""
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev fonts-wqy-microhei \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY quickstart.py requirements.txt constraints.txt ./
COPY requirements/ requirements/
ENV PATH=/app/.venv/bin:$PATH PIP_NO_CACHE_DIR=1
# --no-deps: such an index lacks what else constraints.txt names, which comes with the rest.
RUN python -m venv .venv && { [ -z "$TORCH_INDEX" ] \
    || pip install --no-deps -c constraints.txt torch --index-url "$TORCH_INDEX"; }
RUN python -c "from pathlib import Path; from quickstart import prepare; \
    exit(prepare(Path('/app'), Path('/app/.venv/bin/python'), 'requirements.txt'))"
RUN pip install -c constraints.txt -r requirements/serve.txt
COPY . .
VOLUME /app/out /app/data
CMD ["python", "chat.py", "release"]
