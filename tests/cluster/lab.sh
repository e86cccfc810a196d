#!/usr/bin/env bash
# Hosts on one machine: each has network, PID, mount, IPC and UTS namespaces, addresses on one bridge, a root file system
# of its own (this machine's below, written to memory), a home folder, and sshd. lab.py starts it; see there.
#   lab.sh lab                                        in fresh namespaces: makes the bridge, says "ready", and waits
#   lab.sh add REPOSITORY NAME LOGIN KEY ADDRESS...   in the lab: starts a host; KEY may log in to it, as LOGIN
#   lab.sh host REPOSITORY NAME LOGIN KEY ADDRESS...  in a host's fresh namespaces: becomes the host
# Everything is in memory and inside the namespaces: when a host's first process ends, all of the host is gone, and with
# the lab's first process all of the lab.
set -euo pipefail

work=/mnt  # a file system in memory, seen by these namespaces alone
self=$(readlink -f "${BASH_SOURCE[0]}")

# A first process must adopt orphans: bash waits for them.
# shellcheck disable=SC2016  # expanded by that bash
wait_for_ever='while :; do sleep 3600 & wait $!; done'

start_lab() {
    mount --make-rprivate /
    mount -t tmpfs tmpfs $work
    mkdir $work/shared $work/root
    ssh-keygen -q -t ed25519 -N '' -f $work/key
    ip link set lo up
    ip link add bridge type bridge
    ip link set bridge up
    echo ready
    exec bash -c "$wait_for_ever"
}

add_host() {
    local name=$2 outer inner
    setsid unshare --mount --net --uts --ipc --pid --fork --kill-child "$self" host "$@" >$work/"$name".log 2>&1 </dev/null &
    outer=$!
    fail() { echo "$name did not start: $(cat $work/"$name".log)" >&2; exit 1; }
    until inner=$(pgrep -P $outer); do
        kill -0 $outer 2>/dev/null || fail
        sleep 0.05
    done
    ip link add "to-$name" type veth peer name eth0 netns "$inner"
    ip link set "to-$name" master bridge up
    echo "$inner" > $work/"$name".pid
    until [ -e $work/"$name".up ]; do
        kill -0 "$inner" 2>/dev/null || fail
        sleep 0.05
    done
}

make_root() {
    local root=$1 repository=$2 name=$3 home=$4 folder device
    mount -t tmpfs -o size=4g tmpfs $work/root
    mkdir $work/root/{upper,work,merged}
    mount -t overlay overlay -o "lowerdir=/,upperdir=$work/root/upper,workdir=$work/root/work" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    for device in null zero full random urandom tty; do
        : > "$root/dev/$device"
        mount --bind "/dev/$device" "$root/dev/$device"
    done
    mkdir "$root/dev/pts" "$root/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
    ln -s pts/ptmx "$root/dev/ptmx"
    mount -t tmpfs -o size=16g tmpfs "$root/dev/shm"
    ln -s /proc/self/fd "$root/dev/fd"
    for device in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${device%%:*}" "$root/dev/${device##*:}"; done
    mount -t tmpfs tmpfs "$root/run"
    mount -t tmpfs -o mode=1777,size=1g tmpfs "$root/tmp"
    mkdir -p "$root/run/sshd" "$root$home/.ssh" "$root/mnt/shared"
    [ "$name" != laptop ] || return 0
    mount --bind $work/shared "$root/mnt/shared"  # what NFS is elsewhere
    # The laptop's code is on the laptop alone: nodes must run what was copied to them.
    for folder in invdyn experiments configs data runs; do
        [ ! -d "$root$repository/$folder" ] || mount -t tmpfs -o ro tmpfs "$root$repository/$folder"
    done
}

use_addresses() {
    local address
    # Not in /sys, which still shows this machine's own.
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
    ip link set lo up
    for address in "$@"; do ip address add "$address/32" dev eth0; done
    ip link set eth0 up
    ip route add default dev eth0 src "$1"
}

become_host() {
    local repository=$1 name=$2 login=$3 key=$4 address=$5 root=$work/root/merged home=/home/$3
    shift 4
    use_addresses "$@"
    hostname "$name"
    mount --make-rprivate /
    make_root "$root" "$repository" "$name" "$home"
    echo "$name" > "$root/etc/hostname"
    printf '127.0.0.1 localhost\n%s %s\n' "$address" "$name" > "$root/etc/hosts"
    # A home folder without this machine's settings; its own stays, since Python may be installed there. Whoever logs in
    # is root, under any name: what is this machine's belongs to root.
    # It is the first of root's names: the one that programs find by the number.
    sed -i -e "1i $login:x:0:0::$home:/bin/bash" -e "/^$login:/d" "$root/etc/passwd"
    # There is no way out to a package index: what is pinned is there already, and pip finds it so. And the workers of Ray
    # do not give way to whatever else this machine does: it is the hosts' own.
    printf '%s\n' 'export PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0 PIP_CONFIG_FILE=/dev/null RAY_worker_niceness=0' \
        "${LAB_BASHRC:-}" > "$root$home/.bashrc"
    if [ "$name" = laptop ]; then
        install -m 600 $work/key "$root$home/.ssh/id_ed25519"
    else
        echo "${key:-$(cat $work/key.pub)}" > "$root$home/.ssh/authorized_keys"
        ln -s "$repository/.venv" "$root$home/invdyn-venv"
        # Nor to Debian: what the image needs is there.
        # shellcheck disable=SC2016  # for the script that is written
        printf '#!/bin/sh\nexec "$@"\n' > "$root/usr/local/bin/sudo"
        printf '#!/bin/sh\n' > "$root/usr/local/bin/apt-get"
        chmod 755 "$root/usr/local/bin/sudo" "$root/usr/local/bin/apt-get"
    fi
    chmod 700 "$root$home/.ssh"
    cat > "$root/etc/ssh/sshd_lab" <<-END
	HostKey /etc/ssh/ssh_host_ed25519_key
	PermitRootLogin prohibit-password
	PasswordAuthentication no
	UsePAM no
	MaxSessions 100
	MaxStartups 100
	END
    chroot "$root" ssh-keygen -q -A
    [ "$name" = laptop ] || chroot "$root" /usr/sbin/sshd -E /run/sshd.log -f /etc/ssh/sshd_lab
    : > $work/"$name".up
    cd "$root"
    exec chroot . /bin/bash -c "$wait_for_ever"
}

verb=$1
shift
case $verb in
lab) start_lab ;;
add) add_host "$@" ;;
host) become_host "$@" ;;
esac
