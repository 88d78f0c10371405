# Scenarios of podman: `sh podman.sh NAME`, as in oci.sh.
set -u
export TMPDIR=$PWD
NAME=floe-$1-$$
PODMAN="$ENGINE --root $PWD/storage --runroot $PWD/runroot --cgroup-manager cgroupfs --events-backend file"
PODMAN="$PODMAN --storage-driver vfs --tmpdir $PWD/tmp"
LOOP='i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done'

fail() {
	echo "$*"
	find storage -name dump.log -o -name restore.log 2>/dev/null | while read -r log; do
		grep -a 'Error' "$log" | head -6
	done
	head -c 900 printed 2>/dev/null
	exit 1
}
end() { $PODMAN rm -f -t 0 -a >/dev/null 2>&1; }
trap end EXIT
run() { $PODMAN "$@" >printed 2>&1 || fail "podman $*"; }

image() {
	mkdir -p r/bin r/proc r/sys r/dev r/tmp r/etc r/run
	cp "$BUSYBOX" r/bin/busybox
	for applet in sh sleep echo cat nc tail; do ln -s busybox r/bin/$applet; done
	tar -C r -c . | $PODMAN import - floe-test >printed 2>&1 || fail "no image"
}
begin() { # OPTIONS...
	image
	run run -d --name "$NAME" --network none --pids-limit 0 --security-opt seccomp=unconfined "$@" floe-test sh -c "$LOOP"
	counts
}
count() { $PODMAN exec "$NAME" cat /tmp/count 2>/dev/null; }
counts() {
	for i in 1 2 3 4 5; do
		before=$(count)
		sleep 0.3
		after=$(count)
		[ -n "$before" ] && [ "${after:-0}" -gt "$before" ] && return 0
	done
	fail "the program does not go on: ${before:-nothing} and ${after:-nothing}"
}

scenario_restore() {
	begin
	run container checkpoint "$NAME"
	run container restore "$NAME"
	counts
}
scenario_keep_and_statistics() {
	begin
	run container checkpoint --keep --print-stats "$NAME"
	grep -q memdump_time printed || fail "no statistics of the dump"
	run container restore --keep --print-stats "$NAME"
	grep -q restore_time printed || fail "no statistics of the restore"
	counts
}
scenario_leave_running() {
	begin
	run container checkpoint --leave-running "$NAME"
	counts
}
scenario_export_gzip() { exported gzip; }
scenario_export_none() { exported none; }
scenario_export_zstd() { exported zstd; }
exported() {
	begin
	run container checkpoint --compress "$1" --export "$PWD/archive" "$NAME"
	run rm -f "$NAME"
	run container restore --import "$PWD/archive"
	counts
}
scenario_other_name() {
	begin
	run container checkpoint --export "$PWD/archive" "$NAME"
	run container restore --import "$PWD/archive" --name "$NAME-2"
	NAME=$NAME-2
	counts
}
scenario_pre_checkpoint() {
	begin
	run container checkpoint --pre-checkpoint "$NAME"
	counts
	run container checkpoint --with-previous "$NAME"
	run container restore "$NAME"
	counts
}
scenario_pre_checkpoint_export() {
	begin
	run container checkpoint --pre-checkpoint --export "$PWD/first" "$NAME"
	run container checkpoint --with-previous --export "$PWD/second" "$NAME"
	run rm -f "$NAME"
	run container restore --import-previous "$PWD/first" --import "$PWD/second"
	counts
}
scenario_volume() {
	mkdir data
	begin -v "$PWD/data:/data"
	run container checkpoint "$NAME"
	run container restore "$NAME"
	counts
}
scenario_terminal() {
	begin -t
	run container checkpoint "$NAME"
	run container restore "$NAME"
	counts
}
scenario_file_locks() {
	begin
	run container checkpoint --file-locks "$NAME"
	run container restore --file-locks "$NAME"
	counts
}
scenario_tcp_established() {
	begin
	run container checkpoint --tcp-established "$NAME"
	run container restore --tcp-established "$NAME"
	counts
}

"scenario_$1"
