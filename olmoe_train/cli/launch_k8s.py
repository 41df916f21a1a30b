"""The objects of `olmoe launch k8s`: a TrainJob with its TrainingRuntime, a JobSet, or a PyTorchJob.

All three run the same container on every node: torchrun, which meets the other nodes at node 0. Its exit
code decides what becomes of the training: 2 fails it at once, and 75 (stopped after saving) starts it again
without counting. Any other failure counts towards max_restarts, and restarts all nodes. Field names and rules
are those of Kubeflow Trainer 2.3, JobSet 0.12 and Training Operator 1.9.
"""

import re
from pathlib import PurePosixPath
from typing import Any

from omegaconf import OmegaConf

from olmoe_train.config.launch import KubernetesConfig, KubernetesKind
from olmoe_train.run.heartbeat import HEARTBEAT_FILE
from olmoe_train.utils.exit_codes import BAD_INPUT, STOPPED_BY_SIGNAL

PORT = 29400
SHARED_MEMORY, HEARTBEAT = "/dev/shm", "/dev/shm/olmoe-heartbeat"
JOIN_SECONDS = 600
"""How long torchrun's nodes wait for each other: --rdzv-conf=timeout of TrainJob and JobSet, join_timeout of
PyTorchJob."""
POLL_SECONDS = 30
LONGEST_NAME = 40
"""Kubernetes allows names of pods 63 characters; JobSet and Job append some 20."""
NODE = "node"
"""Name of the replicated job and of its container: TrainJob accepts no other."""
# Training Operator 1.9 starts a pod again, without counting, if its exit code is at least 128, and takes all
# other codes for final. A signal reaches process 1 alone, which is this shell.
RETRY_75 = f"""\
trap 'kill -TERM $! 2>/dev/null' TERM INT
"$@" & child=$!
code=0; wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
[ "$code" != {STOPPED_BY_SIGNAL} ] || code=143
exit "$code"
"""


def k8s_errors(cfg: KubernetesConfig) -> list[str]:
    """What is wrong with the launcher's own keys: one message per error."""
    errors = []
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", cfg.name) or len(cfg.name) > LONGEST_NAME:
        errors.append(
            f"name={cfg.name}: must be at most {LONGEST_NAME} small letters, digits and -, and start with a "
            "letter"
        )
    if cfg.max_restarts < 0:
        errors.append(f"max_restarts={cfg.max_restarts}: must not be negative")
    errors += [
        f"volumes.{claim}={path}: must be an absolute path, and not {SHARED_MEMORY}"
        for claim, path in cfg.volumes.items()
        if not path.startswith("/") or PurePosixPath(path) == PurePosixPath(SHARED_MEMORY)
    ]
    mounts = [PurePosixPath(path) for path in cfg.volumes.values()]
    if cfg.check and not any(mount in PurePosixPath(cfg.run_dir).parents for mount in mounts):
        errors.append(
            f"run_dir={cfg.run_dir}: is in no volume, so the run would be lost with its pods; mount a claim, "
            "volumes={CLAIM: /runs}, and give run_dir=/runs/NAME"
        )
    return errors


def k8s_yaml(cfg: KubernetesConfig, overrides: list[str]) -> str:
    """YAML for `kubectl apply -f -`.

    Args:
        cfg: The launcher's keys.
        overrides: Arguments of the training.
    """
    render = {
        KubernetesKind.trainjob: _trainjob,
        KubernetesKind.jobset: _jobset,
        KubernetesKind.pytorchjob: _pytorchjob,
    }
    documents = render[cfg.kind](cfg, overrides)
    return "---\n".join(OmegaConf.to_yaml(document) for document in documents)


def _trainjob(cfg: KubernetesConfig, overrides: list[str]) -> list[dict[str, Any]]:
    """The runtime says how a node runs, the job what this training is. Kubeflow's plugin for torch adds the
    variables that `_jobset` sets itself."""
    command = _command(overrides)
    pod = _pod(cfg, NODE, command[:1])
    job = _replicated_job(pod)
    job["template"]["metadata"] = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": _metadata(cfg),
        "spec": {
            "mlPolicy": {"numNodes": cfg.nodes, "torch": {}},
            "template": {"spec": _jobset_spec(cfg, job)},
        },
    }
    trainer = {"numNodes": cfg.nodes, "numProcPerNode": cfg.ranks_per_node, "args": command[1:]}
    training = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(cfg),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": cfg.name},
            "trainer": trainer,
        },
    }
    return [runtime, training]


def _jobset(cfg: KubernetesConfig, overrides: list[str]) -> list[dict[str, Any]]:
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    pod = _pod(cfg, NODE, _command(overrides))
    pod["containers"][0]["env"] += [
        {"name": "PET_NNODES", "value": str(cfg.nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(cfg.ranks_per_node)},
        {"name": "PET_NODE_RANK", "valueFrom": index},
        {"name": "PET_MASTER_ADDR", "value": f"{cfg.name}-{NODE}-0-0.{cfg.name}"},  # JobSet's DNS name
        {"name": "PET_MASTER_PORT", "value": str(PORT)},
    ]
    job = _replicated_job(pod)
    job["template"]["spec"] |= {"parallelism": cfg.nodes, "completions": cfg.nodes}
    return [
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": _metadata(cfg),
            "spec": _jobset_spec(cfg, job),
        }
    ]


def _pytorchjob(cfg: KubernetesConfig, overrides: list[str]) -> list[dict[str, Any]]:
    """A job of workers, without a master: the operator sets torchrun's variables from the elastic policy. A
    rank that fails is restarted by torchrun, on all nodes, because the operator has no such action."""
    command = ["/bin/bash", "-c", RETRY_75, "bash", *_command(overrides)]
    pod = _pod(cfg, "pytorch", command)
    del pod["restartPolicy"]  # the operator sets it
    worker = {"replicas": cfg.nodes, "restartPolicy": "ExitCode", "template": {"spec": pod}}
    spec = {
        "nprocPerNode": str(cfg.ranks_per_node),
        "runPolicy": {"cleanPodPolicy": "None"},
        "elasticPolicy": {
            "rdzvBackend": "c10d",
            "rdzvHost": f"{cfg.name}-worker-0",
            "rdzvPort": PORT,
            "rdzvId": cfg.name,
            # Seconds that the others wait for the pod of node 0 if it is replaced; torchrun's default is 60.
            "rdzvConf": [{"key": "read_timeout", "value": str(JOIN_SECONDS)}],
            "maxRestarts": cfg.max_restarts,
            "minReplicas": cfg.nodes,
            "maxReplicas": cfg.nodes,
        },
        "pytorchReplicaSpecs": {"Worker": worker},
    }
    return [{"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": _metadata(cfg), "spec": spec}]


def _metadata(cfg: KubernetesConfig) -> dict[str, Any]:
    return {"name": cfg.name} | ({"namespace": cfg.namespace} if cfg.namespace else {})


def _jobset_spec(cfg: KubernetesConfig, job: dict[str, Any]) -> dict[str, Any]:
    """A job that a bad configuration has failed is not tried again; any other failure restarts all nodes."""
    bad_configuration = {
        "name": "badConfiguration",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": cfg.max_restarts, "rules": [bad_configuration]},
        "replicatedJobs": [job],
    }


def _replicated_job(pod: dict[str, Any]) -> dict[str, Any]:
    def on_exit(code: int, action: str) -> dict[str, Any]:
        return {
            "action": action,
            "onExitCodes": {"containerName": NODE, "operator": "In", "values": [code]},
        }

    rules = [
        on_exit(BAD_INPUT, "FailJob"),
        on_exit(STOPPED_BY_SIGNAL, "Ignore"),
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    spec = {
        "backoffLimit": 0,  # a node that fails ends the job, and the JobSet restarts all nodes together
        "completionMode": "Indexed",
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod},
    }
    return {"name": NODE, "replicas": 1, "template": {"spec": spec}}


def _command(overrides: list[str]) -> list[str]:
    # Kubernetes expands $(NAME) in a command, and takes $$ for $.
    words = [word.replace("$", "$$") for word in overrides]
    return ["python", "-m", "olmoe_train.cli.torchrun", "-m", "olmoe_train.train", *words]


def _pod(cfg: KubernetesConfig, container: str, command: list[str]) -> dict[str, Any]:
    """What runs on a node: a container of this name with this command."""
    env = {"PET_SHUTDOWN_TIMEOUT": str(cfg.save_seconds), HEARTBEAT_FILE: HEARTBEAT}
    if cfg.cpus_per_node:
        env["OMP_NUM_THREADS"] = str(max(1, cfg.cpus_per_node // cfg.ranks_per_node))
    volume_of = {claim: claim.replace(".", "-") for claim in cfg.volumes}  # a volume's name has no dots
    memory = {"medium": "Memory", "sizeLimit": cfg.shared_memory}
    main = {
        "name": container,
        "image": cfg.image,
        "command": command,
        "env": [{"name": name, "value": value} for name, value in (env | cfg.env).items()],
        "envFrom": [{"secretRef": {"name": secret}} for secret in cfg.secrets],
        "ports": [{"name": "rendezvous", "containerPort": PORT}],
        "resources": _resources(cfg),
        "livenessProbe": _probe(cfg),
        "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}} if cfg.rdma else {},
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": SHARED_MEMORY},
            *({"name": volume_of[claim], "mountPath": path} for claim, path in cfg.volumes.items()),
        ],
    }
    claims = [
        {"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in volume_of.items()
    ]
    gpu_taint = {"key": cfg.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": cfg.grace_seconds,
        "nodeSelector": dict(cfg.node_selector),
        "tolerations": [gpu_taint] if cfg.gpus_per_node else [],
        "containers": [{key: value for key, value in main.items() if value not in ([], {})}],
        "volumes": [{"name": "shared-memory", "emptyDir": memory}, *claims],
    }
    return {key: value for key, value in pod.items() if value not in ([], {})}


def _resources(cfg: KubernetesConfig) -> dict[str, Any]:
    devices = {name: str(count) for name, count in cfg.rdma.items()}
    if cfg.gpus_per_node:
        devices[cfg.gpu_resource] = str(cfg.gpus_per_node)
    requested = {"cpu": cfg.cpus_per_node and str(cfg.cpus_per_node), "memory": cfg.memory_per_node}
    requests = {name: value for name, value in requested.items() if value}
    resources = {"requests": requests | devices, "limits": devices}
    return {key: value for key, value in resources.items() if value}


def _probe(cfg: KubernetesConfig) -> dict[str, Any]:
    """Whether the ranks of the node still make progress, by the time of their newest heartbeat.

    The run itself ends sooner: its watchdog after trainer.timeout, and the nodes' rendezvous after
    JOIN_SECONDS. The probe is for a node that can do neither. Before the first heartbeat it passes.
    """
    limit = int(cfg.trainer.timeout) + JOIN_SECONDS + 2 * POLL_SECONDS
    age = f"$(( $(date +%s) - $(stat -c %Y {HEARTBEAT}) ))"
    return {
        "exec": {"command": ["/bin/sh", "-c", f"[ ! -e {HEARTBEAT} ] || [ {age} -lt {limit} ]"]},
        "periodSeconds": POLL_SECONDS,
        "timeoutSeconds": 10,
        "failureThreshold": 3,
    }
