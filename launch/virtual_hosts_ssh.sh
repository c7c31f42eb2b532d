#!/usr/bin/env bash
# Stands in for ssh among the hosts of virtual_hosts.sh: virtual_hosts_ssh.sh [options] HOST COMMAND...
set -euo pipefail

while [[ $1 == -* ]]; do
    case $1 in
        -[lpiFo]) shift 2 ;;
        *) shift ;;
    esac
done
process=$(<"$VIRTUAL_HOSTS_FOLDER/$1")
shift
# As ssh does, it hands the words to a shell. The hosts' processes are children of the one that is known here.
exec nsenter --target "$process" --net --uts --ipc --mount --pid="/proc/$process/ns/pid_for_children" \
    --wdns="$PWD" sh -c "$*"
