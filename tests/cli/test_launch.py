"""`olmoe launch`: what SLURM and Kubernetes are told, and what is refused before they are."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from olmoe_train.cli import launch
from olmoe_train.cli.launch_k8s import k8s_errors, k8s_yaml
from olmoe_train.cli.launch_slurm import slurm_errors, slurm_script
from olmoe_train.config.launch import KubernetesConfig, KubernetesKind, SlurmConfig
from tests.support import fork_server
from tests.support.commands import REPO, command_environment
from tests.support.faults import status, write_data
from tests.support.hosts import wait_until
from tests.support.kubernetes import check_custom_resource, check_job, check_pod
from tests.support.runs import TINY

CLUSTER: dict[str, Any] = {
    "image": "registry.local/olmoe:1",
    "nodes": 4,
    "volumes": {"runs": "/runs", "data.v1": "/data"},
    "run_dir": "/runs/a",
}
EVERYTHING: dict[str, Any] = {
    "cpus_per_node": 96,
    "memory_per_node": "900Gi",
    "rdma": {"rdma/ib": 8},
    "shared_memory": "64Gi",
    "env": {"NCCL_DEBUG": "WARN"},
    "secrets": ["wandb"],
    "node_selector": {"gpu": "h100"},
    "namespace": "research",
    "max_restarts": 5,
}
TRAINING = ["experiment=quickstart", "data.dir=/data/py", "run_dir=/runs/a"]


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """Run `olmoe launch WORDS`: (exit code, what it printed, its errors)."""
    monkeypatch.setattr(sys, "argv", ["olmoe", *words])
    code = launch.run()
    return code, *capsys.readouterr()


def objects(kind: str, **changes: Any) -> list[dict[str, Any]]:
    """The objects of a launcher's keys, as a cluster would read them."""
    cfg = KubernetesConfig(**CLUSTER | changes, kind=KubernetesKind[kind])
    assert k8s_errors(cfg) == []
    return list(yaml.safe_load_all(k8s_yaml(cfg, ["experiment=quickstart", "run_dir=/runs/a"])))


def script_of(trainings: list[list[str]], is_array: bool = False, **changes: Any) -> str:
    cfg = SlurmConfig(**changes)
    assert slurm_errors(cfg) == []
    return slurm_script(cfg, trainings, is_array)


@pytest.mark.parametrize("kind", ["trainjob", "jobset", "pytorchjob"])
@pytest.mark.parametrize("more", [{}, EVERYTHING, {"gpus_per_node": 0}], ids=["least", "everything", "cpu"])
def test_kubernetes_would_accept_the_objects(kind: str, more: dict[str, Any]) -> None:
    documents = objects(kind, **more)
    kinds = {"trainjob": ["TrainingRuntime", "TrainJob"], "jobset": ["JobSet"], "pytorchjob": ["PyTorchJob"]}
    assert [document["kind"] for document in documents] == kinds[kind]
    for document in documents:
        check_custom_resource(document)
    spec = documents[0]["spec"]
    if kind == "pytorchjob":
        check_pod(spec["pytorchReplicaSpecs"]["Worker"]["template"])
        return
    jobs = spec if kind == "jobset" else spec["template"]["spec"]
    template = jobs["replicatedJobs"][0]["template"]
    check_job(template)
    # The API server's own rules, which no schema has.
    assert template["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    policy = template["spec"]["podFailurePolicy"]["rules"]
    (container,) = template["spec"]["template"]["spec"]["containers"]
    assert {rule["onExitCodes"]["containerName"] for rule in policy if "onExitCodes" in rule} == {
        container["name"]
    }


def test_a_field_that_a_schema_does_not_have_is_found() -> None:
    (document,) = objects("jobset")
    document["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        check_custom_resource(document)
    template = document["spec"]["replicatedJobs"][0]["template"]
    template["spec"]["template"]["spec"]["terminationGracePeriod"] = 300
    with pytest.raises(jsonschema.ValidationError, match="terminationGracePeriod"):
        check_job(template)


def test_exit_codes_time_to_save_and_devices() -> None:
    """2 fails the job at once and 75 is not counted; 240 s to save, and 60 s more before the kill."""
    (document,) = objects("jobset", **EVERYTHING)
    assert document["metadata"] == {"name": "olmoe", "namespace": "research"}
    failure = document["spec"]["failurePolicy"]
    assert failure["maxRestarts"] == 5
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in failure["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    by_code = {
        rule["onExitCodes"]["values"][0]: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert by_code == {2: "FailJob", 75: "Ignore"}
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert pod["terminationGracePeriodSeconds"] == 300
    assert environment["PET_SHUTDOWN_TIMEOUT"] == "240"
    assert (environment["PET_NNODES"], environment["PET_NPROC_PER_NODE"]) == ("4", "8")
    assert environment["OMP_NUM_THREADS"] == "12"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "rdma/ib": "8"}
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert container["volumeMounts"][0]["mountPath"] == "/dev/shm"
    assert pod["volumes"][2] == {"name": "data-v1", "persistentVolumeClaim": {"claimName": "data.v1"}}


def test_a_worker_of_a_pytorchjob_is_started_again_after_75() -> None:
    """The operator retries codes from 128 on. SIGTERM reaches process 1, which passes it on and waits."""
    (document,) = objects("pytorchjob")
    worker = document["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] == "ExitCode"
    shell = worker["template"]["spec"]["containers"][0]["command"]
    shell = shell[: shell.index("python")]
    codes = {
        code: subprocess.run([*shell, "bash", "-c", f"exit {code}"]).returncode for code in (0, 1, 2, 75, 137)
    }
    assert codes == {0: 0, 1: 1, 2: 2, 75: 143, 137: 137}
    saves = "trap 'sleep 0.3; exit 75' TERM; echo up; while :; do sleep 0.05; done"
    with subprocess.Popen([*shell, "bash", "-c", saves], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(10) == 143


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_dir": "/other/a"}, "run_dir=/other/a: is in no volume"),
        ({"name": "My_Run"}, "name=My_Run: must be at most 40 small letters"),
        ({"volumes": {"a": "runs"}, "check": False}, "volumes.a=runs: must be an absolute path"),
    ],
)
def test_mistakes_in_keys_of_kubernetes(changes: dict[str, Any], message: str) -> None:
    (error,) = k8s_errors(KubernetesConfig(**CLUSTER | changes))
    assert error.startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["k8s", *TRAINING, "--submit"], "pipe it into `kubectl apply -f -`"),
        (["k8s", *TRAINING], "image=..."),
        (["slurm", *TRAINING, "nods=2"], "did you mean nodes?"),
        (
            ["slurm", *TRAINING, "nodes=0", "time=1 h"],
            "nodes=0: must be at least 1\n  - time='1 h': must be one word",
        ),
        (
            ["slurm", *TRAINING, "nodes=3", "gpus_per_node=1"],
            "trainer.global_batch_size=8: must be a multiple of",
        ),
        (["slurm", *TRAINING, "--nproc", "2"], "--nproc: no flag of `olmoe launch slurm`"),
        (
            ["slurm", *TRAINING, "gpus_per_node=1", "-m", "trainer.max_steps=5,-1"],
            "max_steps--1: trainer.max_steps=-1:",
        ),
        (["slurm", *TRAINING, "model.init_from=/nowhere"], "model.init_from=/nowhere: neither"),
        (["pbs"], "no launcher 'pbs'; give one of slurm, k8s"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_printed(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, errors = call(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert message in errors


def test_overrides_reach_the_training_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the check, a model may be elsewhere. bash takes what is quoted; Kubernetes takes $$ for $."""
    words = [*TRAINING, "logging.wandb.project=${oc.env:USER,x}", "model.init_from=/nowhere"]
    options = ["check=false", "gpus_per_node=0"]
    _, script, _ = call(monkeypatch, capsys, "slurm", "--print", words[0], *options, *words[1:])
    before = script.split("# From here on")[0] + 'printf "%s\n" "$@"'
    shown = subprocess.run(["bash", "-c", before], capture_output=True, text=True)
    assert shown.stdout.splitlines() == words
    k8s = ["image=i", "kind=jobset"]
    _, text, _ = call(monkeypatch, capsys, "k8s", words[0], *k8s, *options, *words[1:])
    (container,) = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert [word.replace("$$", "$") for word in container["command"][-len(words) :]] == words
    assert container["command"][-2] == "logging.wandb.project=$${oc.env:USER,x}"


def test_the_script_of_slurm() -> None:
    more: dict[str, Any] = {
        "time": "12:00:00",
        "array_limit": 3,
        "save_seconds": 540,
        "setup": ["export A=1"],
    }
    script = script_of([["seed=1"]], nodes=2, gpus_per_node=1, **more)
    assert re.findall(r"^#SBATCH (.+)$", script, re.MULTILINE) == [
        *("--job-name=olmoe", "--nodes=2", "--gpus-per-node=1", "--time=12:00:00", "--output=olmoe-%j.log"),
        *("--signal=TERM@600", "--ntasks-per-node=1", "--exclusive", "--requeue", "--open-mode=append"),
    ]
    before, body = script.split("# From here on this is launch/slurm.sbatch.\n")
    assert (REPO / "launch" / "slurm.sbatch").read_text().endswith(body)
    assert len(body.splitlines()) > 30
    shown = subprocess.run(
        ["bash", "-c", before + 'echo "$A" "$PET_SHUTDOWN_TIMEOUT"'], capture_output=True, text=True
    )
    assert shown.stdout == "1 540\n"


def test_an_array_has_a_task_for_each_combination() -> None:
    script = script_of([["seed=3", "run_dir=s/a"], ["seed=4", "run_dir=s/b"]], is_array=True, array_limit=1)
    assert "#SBATCH --array=0-1%1\n" in script
    assert "#SBATCH --output=olmoe-%A_%a.log\n" in script
    before = script.split("# From here on")[0] + 'echo "$@"'
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1"}
    shown = subprocess.run(["bash", "-c", before], env=environment, capture_output=True, text=True)
    assert shown.stdout == "seed=4 run_dir=s/b\n"


@pytest.mark.ranks
@pytest.mark.slow
def test_the_containers_of_two_nodes_train_and_save_when_one_is_evicted(tmp_path: Path) -> None:
    """The command and the variables of a JobSet's pods, on this machine: the name of node 0 is localhost."""
    run_dir, heartbeat = tmp_path / "run", tmp_path / "heartbeat"
    changes = TINY | {
        "model.vocab_size": 64,
        "data.dir": write_data(tmp_path / "data"),
        "run_dir": run_dir,
        "trainer.max_steps": 5000,
    }
    cfg = KubernetesConfig(image="i", kind=KubernetesKind.jobset, nodes=2, gpus_per_node=0)
    document = yaml.safe_load(k8s_yaml(cfg, [f"{key}={value}" for key, value in changes.items()]))
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    here = {"PET_MASTER_ADDR": "localhost", "OLMOE_HEARTBEAT_FILE": str(heartbeat)}
    here["PET_MASTER_PORT"] = str(20000 + os.getpid() % 10000)
    command = [fork_server.python(), *container["command"][1:]]
    probe = [word.replace(variables["OLMOE_HEARTBEAT_FILE"], str(heartbeat))
             for word in container["livenessProbe"]["exec"]["command"]]  # fmt: skip
    assert subprocess.run(probe).returncode == 0, "before the first heartbeat the node is alive"
    pods = []
    for node in range(2):
        here |= {"PET_NODE_RANK": str(node), "PYTHON_EXEC": fork_server.python()}
        environment = command_environment() | variables | here
        log = (tmp_path / f"{node}.log").open("w")
        pods.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        wait_until(lambda: (run_dir / "metrics.jsonl").exists(), 90, "the first step")
        assert subprocess.run(probe).returncode == 0
        pods[1].send_signal(signal.SIGTERM)
        logs = [(tmp_path / f"{node}.log").read_text() for node in range(2)]
        assert [one.wait(60) for one in pods] == [75, 75], logs
        assert (status(run_dir)["state"], status(run_dir)["reason"]) == ("stopped", "signal")
        os.utime(heartbeat, (1, 1))
        assert subprocess.run(probe).returncode == 1, "a node without progress for hours"
    finally:
        for one in pods:
            one.kill()
            one.wait()
