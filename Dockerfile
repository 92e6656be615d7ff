# docker build -t cql . && docker run --rm cql; docs/docker.md has GPUs, folders of the host, W&B and a smaller image without CUDA.
FROM python:3.11-slim-bookworm

# A C++ compiler for torch.compile (on a GPU, too); EGL and OpenGL for videos without a screen.
RUN apt-get update && apt-get install -y --no-install-recommends g++=4:12.2.* libegl1=1.6.* libgl1=1.6.* \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY requirements*.txt ./
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir -r requirements-dev.txt -r requirements-extra.txt

COPY . .
# Any user that --user names may write here, and has a name and a home.
ENV HOME=/home/researcher USER=researcher MINARI_DATASETS_PATH=/data MUJOCO_GL=egl
RUN useradd --create-home --uid 1000 researcher && mkdir -p runs /data && chmod 1777 . runs /data "$HOME"
USER 1000
RUN export MINARI_DATASETS_PATH=/tmp/smoke \
    && python benchmarks/collect.py --env LunarLanderContinuous-v3 --policy random --steps 1000 --id smoke/random-v0 \
    && python algorithms/offline/cql.py --env smoke/random-v0 --max_timesteps 10 --n_episodes 1 --checkpoints_path /tmp/smoke \
    && rm -rf /tmp/*
CMD ["python", "algorithms/offline/cql.py", "--help"]
