# shellcheck shell=bash disable=SC2034
# Functions of the scripts in launch/ and slurm/, to be sourced; some leave their result in a variable.
# Environment that all of these scripts read:
#   MPIRUN   the mpirun to use; else the one on PATH, else the one of this tree's .venv
#   PYTHON   the Python of the ranks; else that of the virtual environment which mpirun belongs to, else python3
#   PROGRAM  what Python runs, in words (default: -m allreduce_sgd.train), e.g. PROGRAM="my_script.py"

settings=() # NAME=value, for --dry-run to print what set_default exported
options=()  # of mpirun
command=()  # what starts the ranks
kind=       # of mpirun: openmpi, mpich or other
restarted=  # whether ranks are started once more, after a failure

die() {
    echo "${0##*/}: $*" >&2
    exit 2
}

print_header() { # FILE: its opening comment is its documentation
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$1"
}

# The user's own value stays: sites know their machines better than these scripts do.
set_default() { # NAME VALUE
    [[ -v $1 ]] && return
    export "$1=$2"
    settings+=("$1=$2")
}

require_count() { # FLAG VALUE
    [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1 wants a whole number of at least 1, got '$2'"
}

find_mpirun() { # TREE: sets mpirun to a path, or fails
    if [[ -n ${MPIRUN:-} ]]; then
        mpirun=$(type -P "$MPIRUN") || die "MPIRUN=$MPIRUN is not a program"
    elif ! mpirun=$(type -P mpirun); then
        mpirun=$1/.venv/bin/mpirun
        [[ -x $mpirun ]] || die "no mpirun on PATH: install MPI, activate an environment that has it, or set MPIRUN"
    fi
    # Open MPI and MPICH find their own daemons on other hosts by the path that they were started with.
    [[ $mpirun == /* ]] || mpirun=$PWD/$mpirun
}

find_python() { # MPIRUN or '': sets python
    local beside=${1%/*}
    if [[ -n ${PYTHON:-} ]]; then
        python=$(type -P "$PYTHON") || die "PYTHON=$PYTHON is not a program"
    # Only in a virtual environment: beside a system's mpirun stands the system's python, not the active one.
    elif [[ -n $1 && -f $beside/../pyvenv.cfg && -x $beside/python ]]; then
        python=$beside/python
    else
        python=$(type -P python3) || die "no python3 on PATH: set PYTHON"
    fi
}

find_program() { # sets program
    read -ra program <<<"${PROGRAM:--m allreduce_sgd.train}"
}

mpi_kind() { # TEXT of a version banner: prints openmpi, mpich or other
    case $1 in
        *"Open MPI"* | *OpenRTE*) echo openmpi ;;
        *MPICH* | *HYDRA*) echo mpich ;;
        *) echo other ;;
    esac
}

check_interface() { # INTERFACE HOSTS: refuses one that this machine has not, and the loopback for more than one host
    local names
    names=$("$python" -c 'import socket; print(*(name for _, name in socket.if_nameindex()))')
    [[ " $names " == *" $1 "* ]] || die "--interface: this machine has no network interface '$1', only: $names"
    [[ $1 != lo ]] || (($2 == 1)) || die "--interface lo: the loopback does not reach other hosts; there are: $names"
}

use_interface() { # KIND (local: messages of MPI stay on this machine) INTERFACE
    set_default GLOO_SOCKET_IFNAME "$2"
    set_default NCCL_SOCKET_IFNAME "$2"
    case $1 in
        openmpi)
            # pml ob1: other transports choose their network themselves and would pass over this one.
            set_default OMPI_MCA_pml ob1
            set_default OMPI_MCA_btl_tcp_if_include "$2"
            set_default PRTE_MCA_prte_if_include "$2"  # Open MPI 5
            set_default OMPI_MCA_oob_tcp_if_include "$2" # Open MPI 4
            ;;
        mpich)
            # UCX finds other ways than the named network on its own (InfiniBand; between containers of one machine even
            # shared memory), so it is held to TCP. Ranks of one node keep the shared memory of MPICH itself (ch4);
            # only an MPICH built or run without it (MPIR_CVAR_NOLOCAL) would go through TCP there too. Where the
            # interface belongs to an RDMA network, set UCX_TLS yourself, e.g. UCX_TLS=rc,sm,self.
            set_default UCX_TLS tcp,self
            set_default UCX_NET_DEVICES "$2"
            ;;
    esac
}

# Ranks of a trainer have several threads each (compute, communication), so no rank is bound to one core. Which cores a
# job may use at all is the scheduler's business; how many threads a rank starts is the program's (OMP_NUM_THREADS).
local_options() { # KIND OVERSUBSCRIBED(0|1)
    case $1 in
        openmpi)
            options+=(--bind-to none)
            # Without ofi the start takes a second less; messages of ob1 do not use it.
            set_default OMPI_MCA_btl ^ofi
            if [[ $(id -u) == 0 ]]; then
                set_default OMPI_ALLOW_RUN_AS_ROOT 1
                set_default OMPI_ALLOW_RUN_AS_ROOT_CONFIRM 1
            fi
            if [[ $2 == 1 ]]; then
                options+=(--map-by slot:OVERSUBSCRIBE)
                set_default OMPI_MCA_mpi_yield_when_idle 1
            fi
            ;;
        mpich) options+=(-bind-to none) ;;
    esac
}

forward_environment() { # KIND: Open MPI hands other hosts only what it is told to; MPICH hands over everything
    [[ $1 == openmpi ]] || return 0
    local name
    local wanted='^(CUDA_|GLOO_|KMP_|MKL_|MPI4PY_|NCCL_|OMP_|OPENBLAS_|PYTHON|TORCH|UCX_|ALLREDUCE_SGD_|PATH$|LD_LIBRARY_PATH$)'
    for name in $(compgen -e); do
        [[ $name =~ $wanted ]] && options+=(-x "$name")
    done
    return 0
}

execute() { # DRY_RUN(0|1) COMMAND...: becomes the command, so that signals and the exit status are the command's own
    local dry_run=$1
    shift
    if [[ $dry_run == 1 ]]; then
        printf '%q ' "${settings[@]}" "$@"
        echo
        exit 0
    fi
    exec "$@"
}

# For a shell that has to stay: mpirun and srun pass on to the ranks what they get.
run_and_forward_signals() { # COMMAND...: returns its status; sets stopped where SIGTERM or SIGINT came
    # In the background a command would get no input and, where the shell is no interactive one, no Ctrl-C.
    "$@" <&0 &
    local child=$! status=0
    stopped=
    # shellcheck disable=SC2064 # the child is known now
    trap "kill -USR1 $child 2>/dev/null" USR1
    # shellcheck disable=SC2064
    trap "stopped=1; kill -TERM $child 2>/dev/null" TERM INT
    # A trapped signal ends `wait` early, with the child still running.
    while wait "$child" || true; kill -0 "$child" 2>/dev/null; do :; done
    # Bash remembers it; the loop's may be that of the signal which interrupted it.
    wait "$child" || status=$?
    trap - USR1 TERM INT
    return "$status"
}

parse_on_failure() { # VALUE of --on-failure: sets restarts
    [[ $1 =~ ^restart=([1-9][0-9]{0,5})$ ]] || die "--on-failure wants restart=K with K of at least 1, got '$1'"
    restarts=${BASH_REMATCH[1]}
}

find_run_folder() { # ARGUMENTS of the program...: sets run_folder, and resumed to the arguments that go on in it
    local output='' resume=''
    resumed=()
    while (($#)); do
        case $1 in
            --output | --resume | --config)
                (($# > 1)) || die "$1 wants a value"
                [[ $1 != --output ]] || output=$2
                [[ $1 != --resume ]] || resume=$2
                shift
                ;;
            --output=*) output=${1#*=} ;;
            --resume=*) resume=${1#*=} ;;
            --config=*) ;; # A resumed run has its own configuration.
            *) resumed+=("$1") ;;
        esac
        shift
    done
    resume=${resume%/}
    [[ $resume != */checkpoints/* ]] || resume=${resume%/checkpoints/*}
    run_folder=${output:-$resume}
    [[ -n $run_folder ]] || die "--on-failure restart=K needs --output FOLDER among the program's arguments"
    resumed+=(--resume "$run_folder")
}

newest_checkpoint() { # FOLDER of a run: prints that of its newest checkpoint, or nothing
    find "$1/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | LC_ALL=C sort | tail -n 1
}

summary_time() { # FOLDER of a run: prints when its summary was written, or nothing
    stat -c %y "$1/summary.json" 2>/dev/null || true
}

# Open MPI's mpirun ends with status 0 also where it lost a daemon, with its host or by a signal, and ended all ranks for
# that. Only the trainer's own runs tell: they write their summary at the end.
ended_early() { # KIND STATUS FOLDER SUMMARY_TIME (before): says whether status 0 means that
    [[ $1/$2 == openmpi/0 && -z ${PROGRAM:-} && -n $(newest_checkpoint "$3") && $(summary_time "$3") == "$4" ]]
}

# Not after 0 (done), 2 (bad input), 75 (pre-empted after a checkpoint), 130 (Ctrl-C), or a signal to this script.
execute_with_restarts() { # RESTARTS ARGUMENTS...: of the program, for which make_command sets command
    local left=$1 status checkpoint say before
    shift
    find_run_folder "$@"
    while :; do
        make_command "$@"
        status=0
        before=$(summary_time "$run_folder")
        run_and_forward_signals "${command[@]}" || status=$?
        if ended_early "$kind" "$status" "$run_folder" "$before"; then
            echo "${0##*/}: mpirun lost a daemon, and ended the ranks with status 0" >&2
            status=1
        fi
        case $status in 0 | 2 | 75 | 130) exit "$status" ;; esac
        [[ -z $stopped ]] || exit "$status"
        say="${0##*/}: ended with status $status"
        if ((left == 0)); then
            echo "$say; no restart is left" >&2
            exit "$status"
        fi
        checkpoint=$(newest_checkpoint "$run_folder")
        if [[ -z $checkpoint ]]; then
            echo "$say; $run_folder has no checkpoint to restart from" >&2
            exit "$status"
        fi
        left=$((left - 1))
        echo "$say; restarting from $checkpoint (restarts left: $left)" >&2
        set -- "${resumed[@]}"
        restarted=1
    done
}
