#!/bin/sh
# The first process of the guest. The kernel prints to the first serial line, we to the second.
/bin/busybox mkdir -p /bin /sbin /usr/bin /usr/sbin
/bin/busybox --install -s 2>/dev/null
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root RUST_BACKTRACE=0
# The kernel's first root cannot be moved, so nobody could make another: over it lies one that can.
if [ "$1" != moved ]; then
	mkdir /moved
	mount --bind / /moved
	cd /moved
	mount --move . /
	exec chroot . /init moved
fi
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t securityfs securityfs /sys/kernel/security
if [ -d /sys/fs/selinux ]; then
	mount -t selinuxfs selinuxfs /sys/fs/selinux
	cat /policy/selinux >/sys/fs/selinux/load
fi
for policy in /policy/apparmor/*; do cat $policy >/sys/kernel/security/apparmor/.replace; done 2>/dev/null
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
# No file system of its own: a program in a mount namespace of its own would get a copy of it.
mkdir -p /tmp && chmod 1777 /tmp
mount -t tmpfs -o mode=755 tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
ln -s pts/ptmx /dev/ptmx 2>/dev/null
ip link set lo up
for module in tun nf_tables overlay; do modprobe $module 2>/dev/null; done
echo 1 >/proc/sys/kernel/panic
stty -F /dev/ttyS1 raw -echo
exec </dev/null >/dev/ttyS1 2>&1

run() {
	echo "@@begin $1"
	timeout -s KILL "$2" sh "$3"
	echo "@@end $1 $?"
}

finish() {
	echo "@@done"
	reboot -f
}

