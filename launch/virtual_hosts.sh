#!/usr/bin/env bash
# A cluster on this one machine: run an MPI job on several virtual hosts that are joined by links of limited rate.
#
#   launch/virtual_hosts.sh [--hosts N] [--ranks-per-host Q] [--rate RATE] [--round-robin] [--mpi KIND] [--] COMMAND...
#
#   --hosts N           virtual hosts, at most 64; default: 2
#   --ranks-per-host Q  ranks on each of them; default: 1
#   --rate RATE         of each host's link, in each direction, as tc writes it (100mbit, 2.5gbit); default: 1gbit
#   --round-robin       rank i is on host i mod N; default: ranks 0 to Q-1 on host1, the next Q on host2, and so on
#   --mpi KIND          mpich or openmpi: refuse an mpirun of another kind (without MPIRUN, mpirun.KIND is tried first)
#   --help              print this text
#
# The first word that is none of these, or `--`, begins the command, e.g.
#
#   launch/virtual_hosts.sh --hosts 4 --rate 100mbit -- python -m allreduce_sgd.train
#
# Each host has its own name (host1, host2, ...), network interface (eth0, 10.77.0.1, 10.77.0.2, ...), process numbers,
# /dev/shm and /run (its TMPDIR), so ranks of different hosts can meet only over the limited links. They share this
# machine's cores, memory and other files. Ranks are bound to no core. mpirun runs beside the hosts, as on a login node,
# on the switch between them; there is no way to other networks. Runs do not see one another. No process, namespace or
# shared memory of a run outlives it, even if this script is killed. SIGTERM and SIGINT reach mpirun as SIGTERM, and it
# has 30 seconds to end.
#
# Needs Linux, root, iproute2, util-linux and procps, and the kernel's tbf queue. The environment goes to all ranks.
# Variables of Open MPI, UCX and Gloo that are set already are kept: without UCX_TLS=tcp,self or pml ob1, MPI might find
# ways past the links.
#
# Environment: MPIRUN (default: mpirun on PATH, else in this tree's .venv). The programs of its virtual environment come
# first on the ranks' PATH.
#
# Exit status: that of mpirun; 1 if the hosts cannot be made; 2 for bad arguments.
set -euo pipefail

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$tree/launch/common.sh"

hosts=2
ranks_per_host=1
rate=1gbit
placement=contiguous
wanted=
while (($#)); do
    case $1 in
        --hosts | --ranks-per-host | --rate | --mpi) (($# > 1)) || die "$1 wants a value" ;;&
        --hosts) require_count "$1" "$2"; hosts=$2; shift 2 ;;
        --ranks-per-host) require_count "$1" "$2"; ranks_per_host=$2; shift 2 ;;
        --rate) rate=$2; shift 2 ;;
        --mpi) wanted=$2; shift 2 ;;
        --round-robin) placement=round-robin; shift ;;
        -h | --help) print_header "${BASH_SOURCE[0]}"; exit 0 ;;
        --) shift; break ;;
        -*) die "unknown flag '$1'; see --help" ;;
        *) break ;;
    esac
done
((${#hosts} <= 2 && hosts <= 64)) || die "--hosts wants at most 64, got '$hosts'"
[[ $rate =~ ^([0-9]+(\.[0-9]+)?)([kmg]?)bit$ ]] || die "--rate wants a number with kbit, mbit or gbit, got '$rate'"
case $wanted in
    '' | mpich | openmpi) ;;
    *) die "--mpi wants mpich or openmpi, got '$wanted'" ;;
esac
(($#)) || die "no command given; see --help"

# No burst lasts longer than a millisecond, but one packet must fit.
burst_bytes=$(awk -v number="${BASH_REMATCH[1]}" -v unit="${BASH_REMATCH[3]}" 'BEGIN {
    bytes = number * (unit == "g" ? 1e9 : unit == "m" ? 1e6 : unit == "k" ? 1e3 : 1) / 8 / 1000
    printf "%d", (bytes > 2000 ? bytes : 2000)
    exit number <= 0 }') || die "--rate wants more than 0, got '$rate'"

for program in ip tc unshare nsenter setpriv setsid pkill; do
    type -P "$program" >/dev/null || PATH=$PATH:/usr/sbin:/sbin type -P "$program" >/dev/null ||
        die "no $program on PATH: install iproute2, util-linux and procps"
done
[[ $(id -u) == 0 ]] || die "making network namespaces needs root"

if [[ -n $wanted && -z ${MPIRUN:-} ]] && type -P "mpirun.$wanted" >/dev/null; then
    MPIRUN=mpirun.$wanted
fi
find_mpirun "$tree"
kind=$(mpi_kind "$("$mpirun" --version 2>&1)")
[[ $kind != other ]] || die "$mpirun is neither Open MPI nor MPICH"
[[ -z $wanted || $wanted == "$kind" ]] || die "--mpi $wanted: $mpirun is of $kind; set MPIRUN"
[[ -f ${mpirun%/*}/../pyvenv.cfg ]] && PATH=${mpirun%/*}:$PATH
export PATH=$PATH:/usr/sbin:/sbin

# The hosts share the cores, which each of them takes for its own.
threads=$(($(nproc) / (hosts * ranks_per_host)))
set_default OMP_NUM_THREADS $((threads > 1 ? threads : 1))
local_options "$kind" 0
use_interface "$kind" eth0
ssh=$tree/launch/virtual_hosts_ssh.sh
slots=$ranks_per_host
list=
[[ $kind == openmpi || $placement == contiguous ]] || slots=1
for ((host = 1; host <= hosts; host++)); do
    list+=${list:+,}host$host:$slots
done
case $kind in
    openmpi)
        options+=(--host "$list")
        [[ $placement == contiguous ]] || options+=(--map-by node)
        ((hosts * ranks_per_host <= $(nproc))) || set_default OMPI_MCA_mpi_yield_when_idle 1
        # One stream leaves a third of a 1 Gbit/s link unused.
        set_default OMPI_MCA_btl_tcp_links 2
        set_default PRTE_MCA_plm_ssh_agent "$ssh"  # Open MPI 5
        set_default OMPI_MCA_plm_rsh_agent "$ssh" # Open MPI 4
        forward_environment openmpi
        ;;
    # With more ranks than the list has places, MPICH goes through it again.
    mpich) options+=(-hosts "$list" -iface eth0 -launcher ssh -launcher-exec "$ssh") ;;
esac

# All that a run makes hangs on one process, the first of a PID namespace, which dies with this script.
setsid setpriv --pdeathsig KILL \
    unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc \
    "$tree/launch/virtual_hosts_cluster.sh" "$hosts" "$rate" "$burst_bytes" \
    "$mpirun" -np "$((hosts * ranks_per_host))" "${options[@]}" "$@" <&0 &
cluster=$!
# unshare itself takes no signals.
trap 'pkill -TERM -P "$cluster"' TERM INT
while :; do
    status=0
    wait "$cluster" || status=$?
    # A signal interrupts the wait, but the job has time to end as it likes.
    kill -0 "$cluster" 2>/dev/null || break
done
exit "$status"
