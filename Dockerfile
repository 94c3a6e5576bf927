# CPU by default; for GPUs: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t agentlightning .
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "torch>=2.11,<2.14" --index-url ${TORCH_INDEX}

WORKDIR /opt/agentlightning
COPY pyproject.toml README.md LICENSE ./
COPY agentlightning agentlightning
COPY configs configs
RUN pip install --no-cache-dir '.[cluster]'

# Runs are kept where a volume is mounted: docker run --shm-size=2g -v $PWD/runs:/runs agentlightning trainer.seed=2
WORKDIR /runs
ENTRYPOINT ["python", "-m", "agentlightning.verl"]
