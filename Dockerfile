# The two commands of the README in a container, on processors or with CUDA.
#
#   docker build -t babyllama .                                   with CUDA, as PyPI's torch has it
#   docker build -t babyllama --build-arg TORCH_INDEX=URL .       torch from an index that pytorch.org
#                                                 names: for processors alone, a tenth of the size
#   docker run --rm -it -v ./out:/app/out babyllama python quickstart.py
#   docker run --rm -it --gpus all -p 8000:8000 -v ./out:/app/out babyllama \
#       python -m serve.server release --host 0.0.0.0
#
# gcc and Python's headers are what int8 kernels, torch.compile and block attention compile with.
FROM python:3.11-slim-bookworm
ARG TORCH_INDEX=""
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev fonts-wqy-microhei \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY requirements.txt constraints.txt ./
COPY requirements/ requirements/
RUN [ -z "$TORCH_INDEX" ] \
    || pip install --no-cache-dir -c constraints.txt torch --index-url "$TORCH_INDEX"
RUN pip install --no-cache-dir -c constraints.txt -r requirements/serve.txt
COPY . .
VOLUME /app/out /app/data
CMD ["python", "chat.py", "release"]
