# shellcheck shell=bash
# What slurm/*.sbatch share: sourced inside a job, after `home` was set to the tree. run_job starts the ranks of the
# trainer, run_again what goes on by itself where it stopped.

# shellcheck source=launch/common.sh
source "${home:?}/launch/common.sh"

mpi_library() { # prints openmpi, mpich or other: what the ranks will load, whatever mpirun happens to be on PATH
    mpi_kind "$("$python" -c 'import mpi4py; mpi4py.rc.initialize = False
from mpi4py import MPI; print(MPI.Get_library_version().strip("\0"))' 2>/dev/null)"
}

# Tried, since srun --mpi=list also names plugins that cannot load their library (Debian's pmix without libpmix.so).
srun_has() { # PLUGIN
    srun --mpi="$1" --nodes=1 --ntasks=1 true >/dev/null 2>&1
}

# A wrong pair (srun --mpi=pmi2 with Open MPI, --mpi=none with MPICH) does not fail: it starts N runs of one rank each.
choose_launch() { # KIND: prints mpirun, pmix or pmi2
    case ${LAUNCH:-} in
        mpirun | pmix | pmi2) echo "$LAUNCH" ;;
        '')
            if [[ $1 == openmpi ]] && srun_has pmix; then
                echo pmix
            elif [[ $1 == mpich ]] && srun_has pmi2; then
                echo pmi2
            else
                echo mpirun
            fi
            ;;
        *) die "LAUNCH must be mpirun, pmix or pmi2, got '$LAUNCH'" ;;
    esac
}

leave_out_config() { # ARGUMENTS...: sets arguments to the others; for a resumed run has its own configuration
    arguments=()
    while (($#)); do
        case $1 in
            --config) shift ;;
            --config=*) ;;
            *) arguments+=("$1") ;;
        esac
        shift
    done
}

# A requeued job runs this script again with the same arguments, so it is told to continue what it finds.
choose_output() { # ARGUMENTS...: sets output, and arguments to those of them that go with it
    local folder=${OUTPUT:-runs/slurm-$SLURM_JOB_ID} word
    output=()
    arguments=("$@")
    for word in "$@"; do
        [[ $word != --output && $word != --output=* && $word != --resume && $word != --resume=* ]] || return 0
    done
    if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -e $folder/checkpoints/latest ]]; then
        output=(--resume "$folder")
        [[ -n ${PROGRAM:-} ]] || leave_out_config "$@"
    elif ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -d $folder ]]; then
        # It ended before its first checkpoint: nothing to go on from, and a used folder would be refused.
        mv "$folder" "$folder.before-restart-$SLURM_RESTART_COUNT"
        output=(--output "$folder")
    else
        output=(--output "$folder")
    fi
}

# The shell has to stay: SLURM gives its warning to the shell (--signal=B:), since Open MPI's daemons, which get it
# without the B:, die of it. mpirun and srun pass USR1 on to the ranks; of TERM, srun and Open MPI's mpirun kill them, so
# what the ranks get of a TERM that comes here is USR1, and SLURM's KillWait or GraceTime is the deadline. A TERM for the
# steps of a job (scancel, pre-emption) reaches ranks that srun started directly.
run_and_warn() { # SIGNAL COMMAND...: gives the command SIGNAL for USR1 and TERM; returns its status, and sets warned
    local signal=$1 child status=0
    shift
    "$@" &
    child=$!
    warned=
    # shellcheck disable=SC2064 # the child is known now
    trap "warned=1; kill -$signal $child 2>/dev/null" USR1 TERM
    # A trapped signal ends `wait` early, with the child still running.
    while wait "$child" || true; kill -0 "$child" 2>/dev/null; do :; done
    # Bash remembers it; the loop's may be that of the signal which interrupted it.
    wait "$child" || status=$?
    trap - USR1 TERM
    return "$status"
}

# PreemptTime is None, or a time.
preempted() { # says whether SLURM wants the job's place for another
    [[ $(scontrol show --oneliner job "$SLURM_JOB_ID" 2>/dev/null) =~ PreemptTime=[0-9] ]]
}

requeue() { # has SLURM start this job again, unless somebody has cancelled it
    [[ " $(scontrol show --oneliner job "$SLURM_JOB_ID" 2>/dev/null) " == *" JobState=RUNNING "* ]] || return 0
    scontrol requeue "$SLURM_JOB_ID" || true
}

run_job() { # ARGUMENTS...
    local mpirun='' python program arguments output kind launch ranks warned before status=0
    ranks=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-1}))}
    mpirun=$(find_mpirun "$home" 2>/dev/null && echo "$mpirun") || mpirun=
    find_python "$mpirun"
    find_program
    kind=$(mpi_library)
    launch=$(choose_launch "$kind") || exit
    choose_output "$@"
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || set_default OMP_NUM_THREADS "$SLURM_CPUS_PER_TASK"
    [[ -z ${INTERFACE:-} ]] || use_interface "$kind" "$INTERFACE"

    local command=()
    if [[ $launch == mpirun ]]; then
        find_mpirun "$home"
        local_options "$kind" 0
        [[ -z ${INTERFACE:-} || $kind != mpich ]] || options+=(-iface "$INTERFACE")
        forward_environment "$kind"
        command=("$mpirun" -np "$ranks" "${options[@]}")
    else
        [[ $kind != openmpi ]] || set_default OMPI_MCA_btl ^ofi
        # srun does not take --cpus-per-task from the job (since SLURM 22.05), and a dead rank must not leave the others.
        command=(srun "--mpi=$launch" --ntasks "$ranks" --kill-on-bad-exit=1)
        [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || command+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    fi
    command+=("$python" "${program[@]}" "${arguments[@]}" "${output[@]}")

    echo "$SLURM_JOB_NUM_NODES node(s), $ranks rank(s): ${command[*]}"
    before=$([[ ${#output[@]} == 0 ]] || summary_time "${output[1]}")
    run_and_warn USR1 "${command[@]}" || status=$?
    ((${#output[@]})) || return "$status"
    # Its daemons end when TERM comes for the job's steps.
    if [[ $launch == mpirun ]] && ended_early "$kind" "$status" "${output[1]}" "$before"; then
        echo "mpirun lost a daemon, and ended the ranks with status 0" >&2
        status=143
    fi
    # 75: the program saved a checkpoint because of the warning; above 128: it died of it, for it had only just begun.
    if ((status == 75)) || { ((status > 128)) && { [[ -n $warned ]] || preempted; }; }; then
        requeue
    fi
    return "$status"
}

run_again() { # COMMAND...: it keeps what it has finished, so that a warning ends it, and the requeued job goes on
    local status=0 warned
    echo "$SLURM_JOB_NUM_NODES node(s): $*"
    run_and_warn TERM "$@" || status=$?
    if [[ -n $warned ]] && ((status != 0)); then
        requeue
        status=75
    fi
    return "$status"
}
