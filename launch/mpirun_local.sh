#!/usr/bin/env bash
# Train on this machine: start N ranks of `python -m allreduce_sgd.train` under Open MPI's or MPICH's mpirun.
#
#   launch/mpirun_local.sh [-n N] [--interface IF] [--on-failure restart=K] [--dry-run] [--] [arguments of the program...]
#
#   -n N                    ranks; default: one for each core that this process may use
#   --interface IF          the network interface that Gloo and NCCL use, e.g. eth0
#   --on-failure restart=K  go on from the last checkpoint of the program's --output, up to K times, when ranks fail
#   --dry-run               print the command and end
#   --help                  print this text (the program's own: -- --help)
#
# The first word that is none of these, or `--`, begins the program's arguments.
#
# Ranks are not bound to cores. More ranks than cores are allowed and take turns, which tests programs but is slow.
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

# nproc would answer with OMP_NUM_THREADS.
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
ranks=$cores
interface=
restarts=
dry_run=0
while (($#)); do
    case $1 in
        -n | -np | --interface | --on-failure) (($# > 1)) || die "$1 wants a value" ;;&
        -n | -np) require_count "$1" "$2"; ranks=$2; shift 2 ;;
        --interface) interface=$2; shift 2 ;;
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
local_options "$kind" "$((ranks > cores))"
[[ -z $interface || $dry_run == 1 ]] || check_interface "$interface" 1
[[ -z $interface ]] || use_interface local "$interface"

make_command() { # ARGUMENTS of the program...
    command=("$mpirun" -np "$ranks" "${options[@]}" "$python" "${program[@]}" "$@")
}

[[ -z $restarts || $dry_run == 1 ]] || execute_with_restarts "$restarts" "$@"
make_command "$@"
execute "$dry_run" "${command[@]}"
