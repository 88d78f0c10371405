# Scenarios of containerd and its client: `sh containerd.sh NAME`, as in oci.sh. Each has a daemon of its own.
set -u
. "${0%/*}/counting.sh"
NAME=floe-$1-$$
CTR="ctr --address $PWD/socket --namespace floe-$$"
LOOP='i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done'
DAEMON=

fail() {
	echo "$*"
	head -c 900 printed 2>/dev/null
	find . /run/containerd -name dump.log -o -name restore.log 2>/dev/null | while read -r log; do
		grep -a 'Error' "$log" | head -6
	done
	exit 1
}
end() {
	for id in $($CTR task ls -q 2>/dev/null); do
		$CTR task kill -s KILL "$id"
		sleep 0.3
		$CTR task rm -f "$id"
	done >/dev/null 2>&1
	[ -z "$DAEMON" ] && return
	kill "$DAEMON"
	wait "$DAEMON"
}
trap end EXIT
run() { $CTR "$@" >printed 2>&1 || fail "ctr $*"; }

# The client always asks for shares of the processor, which version 2 may not have here.
hierarchies() {
	grep -qw cpu /sys/fs/cgroup/cgroup.controllers && return
	umount /sys/fs/cgroup
	mount -t tmpfs tmpfs /sys/fs/cgroup
	for name in cpu cpuacct cpuset memory devices freezer blkio pids; do
		mkdir "/sys/fs/cgroup/$name"
		mount -t cgroup -o "$name" cgroup "/sys/fs/cgroup/$name" || rmdir "/sys/fs/cgroup/$name"
	done
}
daemon() {
	hierarchies 2>/dev/null
	cat >config.toml <<-TOML
		version = 3
		root = "$PWD/root"
		state = "$PWD/state"
		disabled_plugins = ["io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"]
		[grpc]
		address = "$PWD/socket"
		[ttrpc]
		address = "$PWD/socket.ttrpc"
	TOML
	containerd --config config.toml >daemon.log 2>&1 &
	DAEMON=$!
	for i in $(seq 200); do
		$CTR version >/dev/null 2>&1 && return
		sleep 0.1
	done
	tail -n 3 daemon.log
	fail "the daemon does not start"
}
# An image as `docker save` writes it.
image() {
	mkdir -p r/bin r/proc r/sys r/dev r/tmp r/etc r/run i
	cp "$BUSYBOX" r/bin/busybox
	for applet in sh sleep echo cat nc tail tty; do ln -s busybox r/bin/$applet; done
	tar -C r -c -f i/layer.tar .
	digest=$(sha256sum i/layer.tar)
	echo '{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":["sha256:'"${digest%% *}"'"]}}' \
		>i/config.json
	echo '[{"Config":"config.json","RepoTags":["floe.test/test:1"],"Layers":["layer.tar"]}]' >i/manifest.json
	tar -C i -c manifest.json config.json layer.tar | $CTR image import - >printed 2>&1 || fail "no image"
}
begin() { # OPTIONS...
	daemon
	image
	run run -d "$@" floe.test/test:1 "$NAME" sh -c "$LOOP"
	counts
}
within() { $CTR task exec --exec-id "count$(date +%N)" "$NAME" "$@"; }

scenario_task_checkpoint() { # images in a directory
	begin
	mkdir images work
	run task checkpoint --image-path "$PWD/images" --work-path "$PWD/work" "$NAME"
	[ -e images/inventory.img ] || fail "no images"
	counts
}
scenario_task_checkpoint_exit() { # its client has no command that restores from a directory
	begin
	mkdir images
	run task checkpoint --exit --image-path "$PWD/images" "$NAME"
	[ -e images/inventory.img ] || fail "no images"
	for i in $(seq 20); do
		$CTR task ls | grep "$NAME" | grep -q RUNNING || return 0
		sleep 0.1
	done
	fail "it still runs"
}
scenario_task_checkpoint_in_store() {
	begin
	run task checkpoint "$NAME"
	$CTR image ls -q | grep -q checkpoint || fail "no image of the checkpoint"
	counts
}
scenario_container_restore() { # images in the store, with what the container wrote
	begin
	run container checkpoint --rw --image --task "$NAME" floe.test/saved:1
	stood=$(count)
	counts
	run task kill -s KILL "$NAME"
	sleep 0.3
	run task rm -f "$NAME"
	run container rm "$NAME"
	run container restore --rw --live "$NAME" floe.test/saved:1
	counts
	[ "$after" -ge "$stood" ] || fail "it began anew"
}

"scenario_$1"
