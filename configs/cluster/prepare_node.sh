#!/usr/bin/env bash
# What a node needs before Ray starts on it, whatever the cloud: the setup_commands of cluster.yaml, gcp.yaml and
# local.yaml run it on every node, after the file mounts. Running it again changes nothing.
# usage: prepare_node.sh STORAGE           STORAGE: the folder that all nodes share
set -euo pipefail

storage=${1:?usage: prepare_node.sh STORAGE}
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
token=$HOME/.ray/auth_token

fail() { echo "$(hostname): $1" >&2; exit 1; }

# The token: on every node, and for its owner only.
[ -s "$token" ] || fail "the cluster's token must be in $token; make it with 'ray get-auth-token --generate' where you run 'ray up'"
chmod 600 "$token"

# Every command of Ray is run in an interactive login shell, which reads this file.
touch ~/.bashrc
add_line() { grep -qxF -- "$1" ~/.bashrc || echo "$1" >> ~/.bashrc; }
add_line 'export RAY_AUTH_MODE=token'
# shellcheck disable=SC2016  # expanded by the shell that reads it
add_line 'export PATH="$HOME/invdyn-venv/bin:$PATH"'
# `ray submit` copies one script; what the scripts share is found here.
add_line "export PYTHONPATH=\"$project/experiments:$project\""

# data/ and runs/ must be shared: a job ends at its start where a node does not see the folder of the driver.
mkdir -p "$storage/data" "$storage/runs" || fail "the shared storage must be mounted and writable: $storage"

# data/ and runs/ beside the project for `ray job submit` and `ray exec`; and, with configs/, in the home folder, from
# where `ray submit` runs its scripts. So the paths of the laptop hold on the cluster.
link() {
    # A folder in the way would get the link inside it, and everyone their own data.
    [ -L "$2" ] || [ ! -e "$2" ] || fail "$2 must be a link to $1, and is something else; move it away"
    ln -sfn "$1" "$2"
}
for folder in data runs; do
    link "$storage/$folder" "$project/$folder"
    link "$storage/$folder" ~/"$folder"
done
link "$project/configs" ~/configs

bash "$project/configs/cluster/install.sh" ~/invdyn-venv
