#!/usr/bin/env bash
#SBATCH --job-name=invdyn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --exclusive
#SBATCH --output=slurm-%j.log
#
# A Ray cluster for the time of one command, on the nodes of a Slurm job. On the login node, in the project's folder, which
# (with data/ and runs/) must be on a file system that all nodes see:
#   bash configs/cluster/install.sh .venv && sbatch configs/cluster/slurm.sh experiments/sweep.py
# Flags of sbatch come before the file and win over those above: sbatch --nodes=4 configs/cluster/slurm.sh ...
# Without GPUs: sbatch --gpus-per-node=0 ...
# --exclusive: Ray ends with `ray stop`, which ends every Ray process of yours on the node, those of another job too.
# One task a node: it is the node's Ray, and starts as many workers as the node has CPUs and GPUs.
#
# INVDYN_IMAGE=docker://REGISTRY/invdyn:0.1.0 runs everything in the container image, with Apptainer.
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: sbatch configs/cluster/slurm.sh experiments/SCRIPT.py [FLAGS]" >&2; exit 2; }
: "${SLURM_JOB_ID:?must run inside a Slurm job: sbatch configs/cluster/slurm.sh ...}"
cd "${SLURM_SUBMIT_DIR:-.}"

# The token: home folders are shared, so every node finds it. A new one for whoever has none; for its owner only.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
    (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")
fi
chmod 600 "$RAY_AUTH_TOKEN_PATH"

container=()
if [ -n "${INVDYN_IMAGE:-}" ]; then
    container=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" "$INVDYN_IMAGE")
else
    export PATH="$PWD/.venv/bin:$PATH"
fi
export PYTHONPATH="$PWD/experiments:$PWD"
export RAY_USAGE_STATS_ENABLED=0
# Nodes of a large job do not start at the same second; Ray's own limit is 30 s.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}

num_nodes=${SLURM_JOB_NUM_NODES:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
# Not through `head -n 1`: it may leave before scontrol has written all, and pipefail would end the job.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]:?scontrol names no node for $SLURM_JOB_NODELIST}
# By address: a host name that resolves to 127.x on its own node would split the cluster.
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{print $1}')
# A port of its own for each job.
address=$head_ip:$((20000 + SLURM_JOB_ID % 20000))
echo "Ray on $num_nodes node(s), head $head at $address, ${SLURM_CPUS_PER_TASK:-1} CPUs and $gpus GPUs each"

# The same command on every node: the first becomes the head and runs the script, the others join, and all leave with it.
srun --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "${container[@]}" ray symmetric-run --address "$address" --min-nodes "$num_nodes" \
    --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="$gpus" --include-dashboard=true --dashboard-host=127.0.0.1 \
    -- python "$@" --address "$address"
