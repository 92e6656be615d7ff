# docker build -t cql . && docker run --rm -v "$PWD/runs:/app/runs" cql python algorithms/offline/cql.py --help
# PyTorch's wheels bring CUDA along: with the NVIDIA container runtime, add --gpus all.
FROM python:3.11-slim-bookworm

RUN useradd --create-home researcher && mkdir /app && chown researcher /app
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY --chown=researcher . .
USER researcher

RUN python benchmarks/collect.py --env LunarLanderContinuous-v3 --policy random --steps 1000 --id smoke/random-v0 \
    && python algorithms/offline/cql.py --env smoke/random-v0 --max_timesteps 10 --n_episodes 1 --checkpoints_path /tmp/smoke
CMD ["python", "algorithms/offline/cql.py", "--help"]
