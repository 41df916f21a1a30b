# olmoe-train in a container: `launch/image.sh cuda|cpu` builds it. launch/image_steps.sh has the steps.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS base
COPY launch/image_steps.sh /opt/launch/
RUN bash /opt/launch/image_steps.sh system
ENV PATH=/opt/olmoe/bin:$PATH PYTHONUNBUFFERED=1

FROM base AS build
COPY . /src
ARG TORCH_INDEX
RUN bash /src/launch/image_steps.sh install /opt/olmoe

FROM base AS cpu
COPY --from=build /opt/olmoe /opt/olmoe
RUN bash /opt/launch/image_steps.sh check /opt/olmoe cpu

# The last stage is the default one. The driver comes from the host; torch brings the rest of CUDA.
FROM base AS cuda
COPY --from=build /opt/olmoe /opt/olmoe
RUN bash /opt/launch/image_steps.sh check /opt/olmoe cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
