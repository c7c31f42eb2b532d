"""The network interfaces of this host, and choices among them that cannot work.

Environment variables choose which interface carries messages (`--interface` of launch/mpirun_hosts.sh sets them). What
libraries do about a wrong choice between hosts, as seen with MPICH 5.0 (UCX), Open MPI 5.0 and torch 2.13: over the
loopback Open MPI waits for ever, and Gloo until its deadline; MPICH, and all of them with an interface that does not
exist, end with a page of text that does not name the variable. So choices are looked at before the libraries start.
NCCL's variable is read as its manual describes it; that was not tried between hosts.
"""

import contextlib
import ipaddress
import re
import socket
from collections.abc import Mapping, MutableMapping, Sequence

import psutil

__all__ = [
    "GLOO",
    "NCCL",
    "bound_address",
    "interface_mistake",
    "leave_out_wrong_choice",
    "spans_hosts",
    "usable_interfaces",
]

GLOO = "GLOO_SOCKET_IFNAME"
NCCL = "NCCL_SOCKET_IFNAME"
OPEN_MPI = "OMPI_MCA_btl_tcp_if_include"
UCX = "UCX_NET_DEVICES"

# (ranks of this host, all ranks) as launchers announce them.
_ANNOUNCED = (("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"), ("MPI_LOCALNRANKS", "PMI_SIZE"))


def leave_out_wrong_choice(environment: MutableMapping[str, str], launcher: str) -> str | None:
    """Return what is wrong with the interface that `environment` chooses for MPI between hosts, None if nothing.

    The choice is then taken out of it: MPI starts over whatever it finds, and ranks can agree on who tells the mistake.
    """
    if not spans_hosts(environment):
        return None
    # SLURM starts ranks of either library.
    variables = {"Open MPI": (OPEN_MPI,), "MPICH": (UCX,)}.get(launcher, (OPEN_MPI, UCX))
    for variable in variables:
        mistake = interface_mistake(variable, environment.get(variable, ""), between_hosts=True)
        if mistake is not None:
            del environment[variable]
            return mistake
    return None


def spans_hosts(environment: Mapping[str, str]) -> bool:
    """Say whether the launcher announced that the job has ranks on other hosts, before MPI can tell."""
    for here, everywhere in _ANNOUNCED:
        if environment.get(here, "").isdecimal() and environment.get(everywhere, "").isdecimal():
            return int(environment[here]) < int(environment[everywhere])
    nodes = environment.get("SLURM_STEP_NUM_NODES", "")
    return nodes.isdecimal() and int(nodes) > 1


def usable_interfaces(between_hosts: bool) -> dict[str, list[str]]:
    """Return the interfaces that are up and have addresses, and these; `between_hosts` leaves out the loopback."""
    found = sorted(_addresses().items())
    return {name: addresses for name, addresses in found if _flaw(name, addresses, between_hosts) is None}


def interface_mistake(variable: str, value: str, between_hosts: bool) -> str | None:
    """Return why the interfaces that `variable` names cannot serve on this host, in one line, None where one can.

    Of Gloo's, all must serve. What only the library can judge (adapters of RDMA networks, exclusions) passes.
    """
    present = _addresses()
    flaws = []
    for entry in filter(None, map(str.strip, value.split(","))):
        named = _named(variable, entry, present)
        if named is None:
            return None
        reasons = [_flaw(name, present[name], between_hosts) for name in named] or [f"there is no interface {entry}"]
        if None not in reasons:
            flaws.append(reasons[0])
        elif variable != GLOO:
            return None
    if not flaws:
        return None
    choices = ", ".join(usable_interfaces(between_hosts)) or "none"
    return f"{variable}={value}: {flaws[0]} on {socket.gethostname()}; interfaces that can serve: {choices}"


def bound_address(value: str | None) -> tuple[str, str]:
    """Return where Gloo listens on this host, and how it came to that: on the first interface of `value`.

    None or empty: on the first address of the host's own name that is of this host, else on the loopback.
    """
    named = [entry.strip() for entry in (value or "").split(",") if entry.strip()]
    if named:
        name = named[0]
        return _addresses()[name][0], f"the address of {name}"
    host = socket.gethostname()
    found: Sequence[str] = ()
    with contextlib.suppress(OSError):
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    own = {address for addresses in _addresses().values() for address in addresses}
    # All of 127.0.0.0/8 is of this host, though only 127.0.0.1 is listed.
    local = (address for address in found if address in own or ipaddress.ip_address(address).is_loopback)
    return next(local, "127.0.0.1"), f"the address of the name {host}"


def _addresses() -> dict[str, list[str]]:
    """Return all interfaces with their addresses, IPv4 first."""
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        kinds = (socket.AF_INET, socket.AF_INET6)
        # An address of IPv6 may have its interface after a %.
        found[name] = [entry.address.split("%")[0] for kind in kinds for entry in entries if entry.family == kind]
    return found


def _flaw(name: str, addresses: Sequence[str], between_hosts: bool) -> str | None:
    if between_hosts and any(ipaddress.ip_address(address).is_loopback for address in addresses):
        return f"{name} is the loopback, which does not reach other hosts,"
    state = psutil.net_if_stats().get(name)
    if state is not None and not state.isup:
        return f"{name} is down"
    return None if addresses else f"{name} has no address"


def _named(variable: str, entry: str, present: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Return the interfaces that an entry of the variable names, None where that cannot be told here."""
    if variable == NCCL:
        exact = entry.removeprefix("=")
        if entry.startswith("^"):
            return None
        return [name for name in present if name == exact or (exact == entry and name.startswith(entry))]
    if variable == OPEN_MPI and "/" in entry:
        try:
            network = ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return []
        return [name for name, own in present.items() if any(ipaddress.ip_address(each) in network for each in own)]
    if variable == UCX and (entry == "all" or not re.fullmatch(r"[A-Za-z0-9_.-]+", entry)):
        return None
    return [entry] if entry in present else []
