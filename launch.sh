#!/usr/bin/env bash
# Sets up .venv beside this file, starts Ray where several nodes are asked for, and calls the command line.
#
#   ./launch.sh                                                   the quickstart
#   ./launch.sh VERB [config.yaml ...] [section.field=value ...]  see ./launch.sh --help
#   ./launch.sh test [pytest options]                             every check
#
# One machine: Ray starts on loopback and stops with the command. Several:
#   RAY_ADDRESS=HOST:PORT ./launch.sh train ...                   joins that cluster
#   sbatch --nodes=4 launch.sh train ...                          Slurm: one Ray node on each node of the job
#   TANDEM_HEAD=HOST:PORT TANDEM_NODES=4 TANDEM_NODE_RANK=0..3 ./launch.sh train ...   the same line on each, by SSH
#
# Settings: TANDEM_EXTRA=cpu|gpu (default: gpu where nvidia-smi lists one), TANDEM_PYTHON (3.11 or newer),
# TANDEM_TOKEN_FILE (token that the nodes share, mode 600; default: made in runs/), TANDEM_NODES_TIMEOUT_S (300).

set -euo pipefail

say() { echo "launch: $*" >&2; }
die() { say "$1"; exit "${2:-1}"; }

# sbatch runs a copy of this file from a spool folder: the project is then where the job was submitted.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $root/pyproject.toml && -f ${SLURM_SUBMIT_DIR:-}/launch.sh ]]; then
    root=$SLURM_SUBMIT_DIR
fi
venv=$root/.venv
stamp=$venv/installed      # written last: what was installed, for whom and from what
dev_stamp=$venv/installed-dev

# ---- environment -------------------------------------------------------------------------------------------------

find_python() {
    local candidate
    for candidate in ${TANDEM_PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "needs Python 3.11 or newer; looked for: ${TANDEM_PYTHON:-python3 python3.13 python3.12 python3.11} (set TANDEM_PYTHON)"
}

# cpu or gpu. An environment made for GPUs also serves a machine without one, such as a login node.
wanted_extra() {
    if [[ -n ${TANDEM_EXTRA:-} ]]; then
        [[ $TANDEM_EXTRA == cpu || $TANDEM_EXTRA == gpu ]] || die "TANDEM_EXTRA=$TANDEM_EXTRA: must be cpu or gpu" 2
        echo "$TANDEM_EXTRA"
    elif [[ -f $stamp && $(head -n 1 "$stamp") == "gpu "* ]]; then
        echo gpu
    elif command -v nvidia-smi >/dev/null && [[ $(timeout 20 nvidia-smi -L 2>/dev/null) == GPU* ]]; then
        echo gpu
    else
        echo cpu
    fi
}

# What a finished installation is compared by: the extra, the place (environments cannot move), and pyproject.toml.
fingerprint() {
    echo "$extra $root"
    cat "$root/pyproject.toml"
}

is_installed() { # $1: the stamp that the verb needs
    [[ -f $1 && -x $venv/bin/tandem && $(<"$1") == "$(fingerprint)" ]]
}

install() { # $1: the stamp, $2: extras
    local python log=$venv/install.log
    python=$(find_python) || exit 1
    # A mistyped verb is answered now and not after the installation.
    PYTHONPATH=$root "$python" -P -m cluster.cli "$verb" --help >/dev/null || exit $?
    if command -v flock >/dev/null; then
        flock --nonblock 9 || { say "waits for another installation (up to 30 minutes)"; flock --timeout 1800 9; } ||
            die "another installation still holds $root/.venv.lock after 30 minutes"
        if is_installed "$1"; then return; fi
    fi
    # faiss-cpu and faiss-gpu share a folder: another extra, or another place, needs a new environment.
    if [[ ! -f $stamp || $(head -n 1 "$stamp") != "$extra $root" ]]; then
        "$python" -m venv --clear "$venv" || die "cannot make $venv (Debian and Ubuntu: apt install python3-venv)"
    fi
    rm -f "$stamp" "$dev_stamp"
    say "installs .[$2] into .venv: some minutes, once (log: $log)"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check -e "${root}[$2]" >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        die "the installation failed; the whole log: $log"
    fi
    [[ $1 == "$stamp" ]] || fingerprint >"$dev_stamp"
    fingerprint >"$stamp"
    say "installed in $SECONDS s"
    command -v g++ >/dev/null || say "no g++ here: DeepSpeed compiles a small part at its first start and will fail" \
        "(Debian and Ubuntu: apt install g++)"
}

# ---- several machines: cluster/nodes.py does the rest ---------------------------------------------------------------

# Says to cluster/nodes.py where this Slurm node stands; from the batch script it first goes to every node of the job.
use_slurm() {
    if [[ ${SLURM_STEP_NUM_NODES:-0} != "$SLURM_JOB_NUM_NODES" ]]; then
        export TANDEM_EXTRA=$extra # the nodes share this environment
        exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
            ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 "$root/launch.sh" "$@"
    fi
    [[ ${SLURM_LOCALID:-0} == 0 ]] || exit 0 # one Ray node a machine
    local nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export TANDEM_HEAD=${nodes%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))
    export TANDEM_NODES=$SLURM_JOB_NUM_NODES TANDEM_NODE_RANK=$SLURM_NODEID
}

# ---- main --------------------------------------------------------------------------------------------------------

verb=${1:-train}
if [[ " ${*:1:2} " == *" --help "* || " ${*:1:2} " == *" -h "* ]]; then # needs no environment
    python=$(find_python) || exit 1
    PYTHONPATH=$root exec "$python" -P -m cluster.cli "$@"
fi
[[ $# -gt 0 ]] || set -- train
extra=$(wanted_extra) || exit $?
needed=$stamp extras=$extra
if [[ $verb == test ]]; then
    needed=$dev_stamp extras=$extra,dev
fi
if ! is_installed "$needed"; then
    (install "$needed" "$extras") 9>"$root/.venv.lock"
fi
export PATH=$venv/bin:$PATH # DeepSpeed looks for ninja

case $verb in
train | index | evaluate)
    if [[ -z ${RAY_ADDRESS:-} ]]; then
        if [[ -z ${TANDEM_HEAD:-} && ${SLURM_JOB_NUM_NODES:-1} -gt 1 ]]; then use_slurm "$@"; fi
        if [[ -n ${TANDEM_HEAD:-} ]]; then exec "$venv/bin/python" -P -m cluster.nodes "$@"; fi
    fi
    ;;
esac
exec "$venv/bin/tandem" "$@"
