#!/bin/busybox sh
# The first process of the virtual machine of `make test-rdma`: mounts what the host shares, joins
# two RDMA devices (rdma_rxe) by a virtual cable, runs the checks, and powers off. It says what it
# does on the console; the verdict goes to a file on the host, since qemu's status says nothing.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/busybox

stop() {
    /busybox/sync
    /busybox/poweroff -f
}

fail() {
    echo "guest: failed: $*"
    stop
}

share() { # TAG FOLDER OPTIONS
    mkdir -p "$2"
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,cache=$3" "$1" "$2" \
        || fail "cannot mount $1 at $2"
}

/bin/busybox mkdir -p /busybox /proc /sys /dev /tmp /run /root
/bin/busybox --install -s /busybox
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mkdir -p /dev/shm /dev/infiniband
mount -t tmpfs shm /dev/shm
for module in @MODULES@; do # in the order of what they need
    insmod "$module" || fail "cannot load $module"
done
share usr /usr loose
share tree @TREE@ loose
share python @PYTHON@ loose
share out /out none
mkdir -p /run/pyverbs # without the other packages of the host's Python
ln -s /usr/lib/python3/dist-packages/pyverbs /run/pyverbs/pyverbs

# This shell would take its own `ip` before any of the host's.
ip() {
    /usr/bin/env ip "$@"
}

# Both ends of the cable are in one namespace, since rdma_rxe of this kernel knows no others: what
# is sent from one end's address to the other's has to take the cable and not the loopback.
join() { # DEVICE ADDRESS PEER_DEVICE PEER_ADDRESS TABLE
    ip address add "$2/24" dev "$1"
    for knob in accept_local=1 rp_filter=0; do
        echo "${knob#*=}" >"/proc/sys/net/ipv4/conf/$1/${knob%=*}"
    done
    ip rule add pref "$5" iif lo from "$2" to "$4" lookup "$5"
    ip route add "$4" dev "$1" src "$2" table "$5"
    ip neighbour replace "$4" lladdr "$(cat "/sys/class/net/$3/address")" dev "$1"
}

ip link set lo up
ip link add cable0 type veth peer name cable1
ip link set cable0 up
ip link set cable1 up
echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
ip rule add pref 10 lookup local
ip rule del pref 0
join cable0 198.18.0.1 cable1 198.18.0.2 1
join cable1 198.18.0.2 cable0 198.18.0.1 2
for end in 0 1; do
    rdma link add "rxe$end" type rxe netdev "cable$end" || fail "no device rxe$end"
done
rdma link
ulimit -l unlimited

cd @TREE@ || fail "no @TREE@"
export HOME=/root PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=@PYTHONPATH@
# shellcheck disable=SC2086
@PYTHON@/bin/python3 -X faulthandler tests/transfer/rdma_vm/guest.py /out/verdict.json @ARGUMENTS@ 2>&1
echo "guest: the checks ended with status $?"
stop
