#!/usr/bin/env bash
# The inside of virtual_hosts.sh: make the hosts, run a command beside them.
#
#   virtual_hosts_cluster.sh HOSTS RATE BURST_BYTES COMMAND...
#
# It has to be the first process of namespaces of its own (network, names, mounts, processes). The hosts, which are
# namespaces too, end with it. Its network namespace is the switch: eth0 is a bridge with one port to each host.
set -euo pipefail

hosts=$1
rate=$2
burst_bytes=$3
shift 3
network=10.77.0
# Open MPI's daemons name their folders by process number, and those of different hosts are equal.
export TMPDIR=/run
export VIRTUAL_HOSTS_FOLDER=/run # for virtual_hosts_ssh.sh: a file hostN holds the number of that host's process

make_switch() {
    hostname switch
    mount -t tmpfs -o mode=1777 shm /dev/shm
    mount -t tmpfs -o mode=755 run /run
    {
        echo "127.0.0.1 localhost"
        for ((number = 1; number <= hosts; number++)); do
            echo "$network.$number host$number"
        done
        echo "$network.254 switch"
    } >/run/hosts
    mount --bind /run/hosts /etc/hosts
    ip link set lo up
    # A bridge without an address of its own takes that of a port, and another one when the port's host is gone, so that
    # the other hosts would send to nobody for some seconds.
    ip link add eth0 address 02:00:0a:4d:00:fe type bridge
    ip address add "$network.254/24" dev eth0
    ip link set eth0 up
}

limit() { # PROCESS DEVICE: in the direction in which it sends; PROCESS is of its network
    nsenter --target "$1" --net tc qdisc add dev "$2" root tbf rate "$rate" burst "$burst_bytes" latency 50ms
}

make_host() { # NUMBER
    local name=host$1 process
    # What the first process of a host does besides: collect the exit status of processes that lost their parents.
    # shellcheck disable=SC2016
    exec {output}< <(exec unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc bash -ec '
        hostname "$0"
        mount -t sysfs sysfs /sys
        mount -t tmpfs -o mode=1777 shm /dev/shm
        mount -t tmpfs -o mode=755 run /run
        ip link set lo up
        echo ready
        sleep infinity
        exit' "$name")
    process=$!
    read -r -t 10 -u "$output" _ || { echo "virtual_hosts.sh: $name did not come up" >&2; exit 1; }
    exec {output}<&-
    echo "$process" >"/run/$name"
    ip link add "port$1" type veth peer name eth0 netns "$process"
    ip link set "port$1" master eth0 up
    nsenter --target "$process" --net ip address add "$network.$1/24" dev eth0
    nsenter --target "$process" --net ip link set eth0 up
    limit "$process" eth0
    limit $$ "port$1"
}

trap 'exit 143' TERM
make_switch
for ((number = 1; number <= hosts; number++)); do
    make_host "$number"
done
# It passes signals on to the command, and kills it 30 seconds after the first.
exec timeout --foreground --kill-after 30 0 "$@"
