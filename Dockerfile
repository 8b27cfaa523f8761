# docker build -t scbert-companion .
# docker run -p 8888:8888 scbert-companion                      JupyterLab: open the address it prints
# docker run scbert-companion make reproduce                    every notebook; nothing more is downloaded
# docker run -v "$PWD/runs:/home/scbert/companion/runs" ...     keep the results (the folder must be writable by uid 1000)
#
# On a machine with GPUs, build with --build-arg TORCH_INDEX= and run with --gpus all.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 scbert
USER scbert
WORKDIR /home/scbert/companion

# First what the installation depends on, so that editing a notebook does not install everything again.
COPY --chown=scbert pyproject.toml requirements.lock Makefile README.md LICENSE ./
COPY --chown=scbert scbert scbert
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN PIP_NO_CACHE_DIR=1 make .venv/test.installed .venv/workflow.installed .venv/lab.installed TORCH_INDEX="$TORCH_INDEX"

COPY --chown=scbert . .
ENV PATH="/home/scbert/companion/.venv/bin:$PATH"
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "--notebook-dir=notebooks"]
