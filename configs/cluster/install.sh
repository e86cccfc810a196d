#!/usr/bin/env bash
# The one installation step: `make setup`, every node of a cluster, and the container image run this.
# usage: install.sh VENV [EXTRAS]          e.g. install.sh .venv test,lint
# Makes the virtual environment where it is missing and installs what constraints.txt pins. PYTHON names the interpreter.
# What reads s3:// and gs:// always comes along: any node may be given such a URL.
set -euo pipefail

venv=${1:?usage: install.sh VENV [EXTRAS]}
extras=s3,gcs${2:+,$2}
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Ray sets a worker up twice over (2.60): what is installed already is not looked at again.
stamp=$venv/.installed-${extras//,/-}
wanted=$(cat "$project"/{setup.cfg,pyproject.toml,constraints.txt} <(echo "$project") | sha256sum)
[ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ] || exit 0

[ -x "$venv/bin/pip" ] || "${PYTHON:-python3}" -m venv "$venv"
install() { "$venv/bin/pip" install --quiet --disable-pip-version-check -c "$project/constraints.txt" "$@"; }

# torch first: the same pinned line brings CUDA on Linux, or the CPU build where PIP_EXTRA_INDEX_URL leads to it.
install torch
install -e "${project}[$extras]"
echo "$wanted" > "$stamp"
