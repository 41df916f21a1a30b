"""The options of `olmoe launch`: those of the cluster, beside every key of `olmoe train`."""

from dataclasses import dataclass, field, fields
from enum import Enum

from omegaconf import MISSING

from olmoe_train.config.train import TrainConfig


class KubernetesKind(Enum):
    trainjob = "trainjob"
    jobset = "jobset"
    pytorchjob = "pytorchjob"


@dataclass(frozen=True)
class LaunchConfig(TrainConfig):
    """A training, and the nodes that it runs on. Each launcher extends it."""

    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 8
    """GPUs of a node, one rank each. 0: one rank a node, on its CPU."""
    save_seconds: int = 240
    """Time that the run has to save after the signal to stop, in seconds, before its ranks are killed. The
    launcher and the scheduler wait 60 s more."""
    check: bool = True
    """Check the training's configuration for that many ranks before anything is printed. The prepared data
    does not have to exist. false: only the names and types of keys are checked, and the models that
    model.init_from and model.adapter_from name may be on the cluster only."""

    @property
    def ranks(self) -> int:
        """Number of ranks of the training."""
        return self.nodes * self.ranks_per_node

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.gpus_per_node)

    @property
    def grace_seconds(self) -> int:
        """Seconds between the scheduler's signal and its kill."""
        return self.save_seconds + 60


@dataclass(frozen=True)
class SlurmConfig(LaunchConfig):
    """Render a batch script that trains on SLURM, or submit it.

    It accepts every key of `olmoe train` and passes them on. With `--multirun`, every combination of values
    is a task of an array job.
    """

    job_name: str = "olmoe"
    """Name of the job."""
    partition: str | None = None
    """Partition; null: the default of the cluster."""
    account: str | None = None
    """Account that is charged; null: the default of the user."""
    qos: str | None = None
    """Quality of service; null: the default of the cluster."""
    time: str | None = None
    """Time limit, for example 12:00:00 or 2-00:00:00. The job is put back into the queue after it has saved
    at the limit. null: that of the partition."""
    output: str | None = None
    """File of the job's output, with SLURM's patterns; null: olmoe-JOB.log, and olmoe-JOB_TASK.log of an
    array job, in the directory of submission."""
    array_limit: int | None = None
    """Most tasks of an array job that run at the same time; null: as many as there are nodes."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, one a line: ["--constraint=h100", "--reservation=olmoe"]."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash to run on the first node before the training; what they export reaches all nodes:
    ["module load cuda", "export NCCL_SOCKET_IFNAME=ib0"]."""


@dataclass(frozen=True)
class KubernetesConfig(LaunchConfig):
    """Render the YAML of a training on Kubernetes, for `kubectl apply -f -`.

    It accepts every key of `olmoe train` and passes them on.
    """

    kind: KubernetesKind = KubernetesKind.trainjob
    """trainjob: a TrainJob of Kubeflow Trainer 2, with its TrainingRuntime. jobset: a JobSet, without
    Kubeflow. pytorchjob: a PyTorchJob of Kubeflow's Training Operator 1."""
    name: str = "olmoe"
    """Name of the object."""
    namespace: str | None = None
    """Namespace of the object; null: that of the kubectl context."""
    image: str = MISSING
    """Container image with olmoe-train in it, for example one that launch/image.sh has built."""
    volumes: dict[str, str] = field(default_factory=dict)
    """PersistentVolumeClaims to mount, and where: {CLAIM: /PATH}. run_dir must be in one that every node
    can write: a claim with the access mode ReadWriteMany."""
    cpus_per_node: int | None = None
    """CPU cores that a node requests; null: none are requested."""
    memory_per_node: str | None = None
    """Memory that a node requests, for example 900Gi; null: none is requested. It includes shared_memory."""
    shared_memory: str = "16Gi"
    """Size limit of /dev/shm, which NCCL and the loader's workers use. The default of container runtimes is
    64 MiB."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the resource that gpus_per_node counts."""
    rdma: dict[str, int] = field(default_factory=dict)
    """RDMA devices of a node, by the name of their resource: {rdma/ib: 8}. They come with the capability
    IPC_LOCK, which registering memory needs."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables: {NCCL_DEBUG: WARN}. Passwords and keys belong in secrets."""
    secrets: list[str] = field(default_factory=list)
    """Secrets whose entries become environment variables, such as WANDB_API_KEY and HF_TOKEN."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have."""
    max_restarts: int = 3
    """How often a failure restarts the training, which continues from its newest checkpoint. A stop after
    saving does not count, and a bad configuration is not tried again."""


def launcher_keys(schema: type[LaunchConfig]) -> set[str]:
    """The keys of a launcher that `olmoe train` does not have."""
    return {item.name for item in fields(schema)} - {item.name for item in fields(TrainConfig)}
