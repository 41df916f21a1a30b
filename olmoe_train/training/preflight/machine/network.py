"""What a run reaches over the network: the port where ranks meet, the Hugging Face hub, and wandb."""

import errno
import os
import socket
import threading
import urllib.error
import urllib.request

from olmoe_train.config.choices import WandbMode
from olmoe_train.model.hf.hub import SMALL_FILES, WEIGHT_FILES, hub_snapshot, is_hub_name
from olmoe_train.training.preflight.machine.result import Result, Site, State
from olmoe_train.utils.errors import UserError

CONNECT_S = 3.0
REQUEST_S = 5.0
"""Longest time for one request, with the look-up of the name, which has no time limit of its own."""
WANDB_URL = "https://api.wandb.ai"


def ports(site: Site) -> list[Result]:
    """The port where ranks meet is free on the host that it belongs to, or is reached from here.

    Ranks that run this check have met, and gloo has connected every pair of them. So only a check in one
    process looks at the port, before the run: that of RDZV_ENDPOINT, as for launch/torchrun.sh, or of
    MASTER_ADDR and MASTER_PORT.
    """
    if site.world_size > 1:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        return [Result("ports", State.ok, f"all ranks have met at {where}, and each is connected with each")]
    endpoint = os.environ.get("RDZV_ENDPOINT")
    if endpoint is None and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if endpoint is None:
        what = "one process; set RDZV_ENDPOINT=host:port to check where several nodes are to meet"
        return [Result("ports", State.skipped, what)]
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal():
        return [Result("ports", State.failed, f"RDZV_ENDPOINT={endpoint}: is not host:port", "set both")]
    return [port_result(host, int(port))]


def port_result(host: str, port: int) -> Result:
    """Whether a port of a host can be used to meet: free if the host is this one, otherwise reached."""
    where = f"{host}:{port}"
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        fix = "give the host's IP address, or add its name to DNS or to /etc/hosts on every host"
        return Result("ports", State.failed, f"{where}: this host does not know the name: {error}", fix)
    try:
        with socket.socket(address[0], socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address[4])
            listener.listen()
        return Result("ports", State.ok, f"{where} is free on this host")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            fix = f"choose another port, or end what uses it (`ss -ltnp sport = :{port}` names it)"
            return Result("ports", State.failed, f"{where} is in use on this host", fix)
        if error.errno != errno.EADDRNOTAVAIL:  # that is the address of another host
            return Result("ports", State.failed, f"{where}: {error.strerror}", "choose a port above 1023")
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except ConnectionRefusedError:
        fix = f"start the launcher on {host} before this check, or at the same time as the others"
        return Result(
            "ports", State.warning, f"{where}: the host answers, and nothing listens there yet", fix
        )
    except OSError as error:
        what = f"{where} is not reached within {CONNECT_S:g} s: {error}"
        fix = "open the port in the firewall, and look at routes; all ports between the nodes must be open"
        return Result("ports", State.failed, what, fix)
    return Result("ports", State.ok, f"{where} is reached")


def hub(site: Site) -> list[Result]:
    """The hub provides model.init_from, if that is a name on the hub."""
    name, revision = site.cfg.model.init_from, site.cfg.model.revision
    if name is None or not is_hub_name(name):
        return [Result("hub", State.skipped, "nothing of this run is on the hub")]
    from huggingface_hub import constants  # takes half a second to import

    url = constants.ENDPOINT
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(url)
    if not reason:
        return [Result("hub", State.ok, f"{url} is reached")]
    try:
        hub_snapshot(name, revision, SMALL_FILES + WEIGHT_FILES, download=False)
    except UserError:
        what = f"model.init_from={name}: it is not in the cache, and {url} is not reached: {reason}"
        fix = f"run `hf download {name}` where there is a network, and copy the cache (HF_HOME) to this host"
        return [Result("hub", State.failed, what, fix)]
    return [
        Result("hub", State.ok, f"{constants.ENDPOINT} is not reached ({reason}); {name} is in the cache")
    ]


def wandb(site: Site) -> list[Result]:
    """The server of wandb is reached. Without it the run goes on, and logs offline."""
    mode = site.cfg.logging.wandb.mode
    if mode is not WandbMode.online:
        return [Result("wandb", State.skipped, f"logging.wandb.mode={mode.value}")]
    import wandb as package  # takes a second to import

    url = os.environ.get("WANDB_BASE_URL", WANDB_URL)
    if not (os.environ.get("WANDB_API_KEY") or package.api.api_key):
        fix = "run `wandb login`, or set WANDB_API_KEY; or set logging.wandb.mode=offline"
        return [Result("wandb", State.warning, "there is no API key: the run logs offline", fix)]
    if reason := unreachable(url):
        fix = "look at proxies (HTTPS_PROXY) and WANDB_BASE_URL; or set logging.wandb.mode=offline"
        return [Result("wandb", State.warning, f"{url} is not reached: {reason}", fix)]
    return [Result("wandb", State.ok, f"{url} is reached")]


def unreachable(url: str, seconds: float = REQUEST_S) -> str:
    """Why a server does not answer; empty if it does, with whatever status. Proxies are used."""
    outcome = [f"no answer within {seconds:g} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "olmoe-doctor"})
            urllib.request.urlopen(request, timeout=seconds).close()
            outcome[0] = ""
        except urllib.error.HTTPError:
            outcome[0] = ""
        except (OSError, ValueError) as error:
            outcome[0] = str(getattr(error, "reason", error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return outcome[0]
