#!/usr/bin/env bash
# Train on several hosts: start ranks of `python -m allreduce_sgd.train` on each under Open MPI's or MPICH's mpirun.
#
#   launch/mpirun_hosts.sh HOSTFILE [-n N] [--interface IF] [--rsh CMD] [--on-failure restart=K] [--dry-run] [--]
#                          [arguments of the program...]
#
#   HOSTFILE        one host a line, `host`, `host:slots` or `host slots=K`; `#` begins a comment; slots (ranks) default to 1
#   -n N            ranks; default: the sum of the slots; more than that share the hosts in turn
#   --interface IF  the network interface (of the same name on all hosts and here) for MPI, Gloo and NCCL, e.g. eth0
#   --rsh CMD       one program that runs a command on a host, called as ssh is; default: ssh
#   --on-failure restart=K
#                   go on from the last checkpoint of the program's --output, up to K times, when ranks or a host fail;
#                   hosts on which `true` does not run within 10 seconds are left out then, with their ranks
#   --dry-run       print the command and end
#   --help          print this text (the program's own: HOSTFILE -- --help)
#
# The first word after HOSTFILE that is none of these, or `--`, begins the program's arguments.
#
# Every host needs the same MPI, Python environment and working folder at the same paths, and a login without password.
# Ranks are not bound to cores. Variables of CUDA, NCCL, Gloo, UCX, OpenMP, Python and PATH go to all hosts.
# With --interface, Open MPI and MPICH (UCX) talk TCP over that interface only: leave it out on RDMA networks, or set
# OMPI_MCA_pml or UCX_TLS yourself. Ranks of one host keep using shared memory.
#
# Environment: MPIRUN (default: mpirun on PATH, else in this tree's .venv), PYTHON (default: that of mpirun's virtual
# environment, else python3), PROGRAM (default: -m allreduce_sgd.train; e.g. PROGRAM="my_script.py"). OMP_NUM_THREADS is
# left to the program, which shares the cores among the ranks. Variables of Open MPI, UCX, Gloo and NCCL that are set
# already are kept.
#
# Exit status: that of mpirun, the last one; 2 for bad arguments.
set -euo pipefail

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$tree/launch/common.sh"

read_hosts() { # FILE: sets hosts (host:slots ...) and slots (their sum)
    local line number=0
    local pattern='^([A-Za-z0-9._-]+)(:([1-9][0-9]*)|[[:space:]]+slots[[:space:]]*=[[:space:]]*([1-9][0-9]*))?$'
    hosts=()
    slots=0
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line=${line%%#*}
        line=${line#"${line%%[![:space:]]*}"}
        line=${line%"${line##*[![:space:]]}"}
        [[ -n $line ]] || continue
        [[ $line =~ $pattern ]] || die "$1:$number: expected 'host', 'host:slots' or 'host slots=K', got '$line'"
        local here=${BASH_REMATCH[3]:-${BASH_REMATCH[4]:-1}}
        hosts+=("${BASH_REMATCH[1]}:$here")
        slots=$((slots + here))
    done <"$1"
    ((slots)) || die "$1 names no host"
}

answers() { # HOST: says whether a command runs there
    local options=()
    # mpirun starts ranks here without rsh, which a login node need not have for itself.
    [[ $1 != localhost && $1 != "$(hostname)" && $1 != "$(hostname -s)" ]] || return 0
    [[ -n $rsh ]] || options=(-o BatchMode=yes -o ConnectTimeout=8)
    timeout 10 "${rsh:-ssh}" "${options[@]}" "$1" true </dev/null >/dev/null 2>&1
}

drop_dead_hosts() { # keeps in hosts those that answer, and as many ranks as these have slots
    local host probes=() alive=() number
    for host in "${hosts[@]}"; do
        answers "${host%:*}" &
        probes+=("$!")
    done
    for number in "${!hosts[@]}"; do
        if wait "${probes[number]}"; then
            alive+=("${hosts[number]}")
        else
            echo "${0##*/}: ${hosts[number]%:*} does not answer; going on without it" >&2
            slots=$((slots - ${hosts[number]##*:}))
        fi
    done
    ((${#alive[@]})) || { echo "${0##*/}: no host answers" >&2; exit 1; }
    ((${#alive[@]} == ${#hosts[@]} || ranks <= slots)) || ranks=$slots
    hosts=("${alive[@]}")
}

(($#)) || die "no host file given; see --help"
case $1 in
    -h | --help) print_header "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) die "the first argument is the host file, got '$1'" ;;
esac
[[ -f $1 && -r $1 ]] || die "cannot read the host file '$1'"
read_hosts "$1"
shift

ranks=$slots
interface=
rsh=
restarts=
dry_run=0
while (($#)); do
    case $1 in
        -n | -np | --interface | --rsh | --on-failure) (($# > 1)) || die "$1 wants a value" ;;&
        -n | -np) require_count "$1" "$2"; ranks=$2; shift 2 ;;
        --interface) interface=$2; shift 2 ;;
        --rsh) rsh=$(type -P "$2") || die "--rsh: '$2' is not a program"; shift 2 ;;
        --on-failure) parse_on_failure "$2"; shift 2 ;;
        --dry-run) dry_run=1; shift ;;
        -h | --help) print_header "${BASH_SOURCE[0]}"; exit 0 ;;
        --) shift; break ;;
        *) break ;;
    esac
done

find_mpirun "$tree"
find_python "$mpirun"
find_program
kind=$(mpi_kind "$("$mpirun" --version 2>&1)")
local_options "$kind" "$((ranks > slots))"
[[ -z $interface || $dry_run == 1 ]] || check_interface "$interface" "${#hosts[@]}"
[[ -z $interface ]] || use_interface "$kind" "$interface"
case $kind in
    openmpi)
        host_flag=--host
        # One stream leaves a third of a 1 Gbit/s link unused.
        set_default OMPI_MCA_btl_tcp_links 2
        if [[ -n $rsh ]]; then
            set_default PRTE_MCA_plm_ssh_agent "$rsh"  # Open MPI 5
            set_default OMPI_MCA_plm_rsh_agent "$rsh" # Open MPI 4
        fi
        ;;
    mpich)
        host_flag=-hosts
        [[ -z $interface ]] || options+=(-iface "$interface")
        [[ -z $rsh ]] || options+=(-launcher ssh -launcher-exec "$rsh")
        ;;
    other) die "$mpirun is neither Open MPI nor MPICH: start it yourself with its own options for hosts" ;;
esac
forward_environment "$kind"

make_command() { # ARGUMENTS of the program...
    local list
    [[ -z $restarted ]] || drop_dead_hosts
    list=$(IFS=,; echo "${hosts[*]}")
    command=("$mpirun" -np "$ranks" "$host_flag" "$list" "${options[@]}" "$python" "${program[@]}" "$@")
}

[[ -z $restarts || $dry_run == 1 ]] || execute_with_restarts "$restarts" "$@"
make_command "$@"
execute "$dry_run" "${command[@]}"
