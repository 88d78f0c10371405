# Scenarios of podman: `sh podman.sh NAME`, as in oci.sh.
set -u
. "${0%/*}/servers.sh"
. "${0%/*}/counting.sh"
export TMPDIR=$PWD
NAME=floe-$1-$$
PODMAN="$ENGINE --root $PWD/storage --runroot $PWD/run --cgroup-manager cgroupfs --events-backend file"
PODMAN="$PODMAN --storage-driver vfs --tmpdir $PWD/tmp"
# Podman 4 raises limits, for which the one who may do that must be asked.
export CONTAINERS_CONF=$PWD/containers.conf
printf '[containers]\ndefault_ulimits = ["nofile=%s:%s", "nproc=%s:%s"]\n' \
	"$(ulimit -n)" "$(ulimit -Hn)" 1024 1024 >"$CONTAINERS_CONF"
SECCOMP='--security-opt seccomp=unconfined'
LOOP='i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done'
PROGRAM=$LOOP
# A connection of the container with itself, which carries what is counted.
TALK='sleep 1000 | nc -l -p 99 >/tmp/count & sleep 0.5;
	i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done | nc 127.0.0.1 99; echo over >/tmp/over; sleep 100'

fail() {
	echo "$*"
	find storage -name dump.log -o -name restore.log 2>/dev/null | while read -r log; do
		grep -a 'Error' "$log" | head -6
	done
	head -c 900 printed 2>/dev/null
	exit 1
}
# What the engine itself does wrong, and no criu can mend.
fault() {
	echo "engine fault: $*"
	exit 78
}
end() {
	part
	$PODMAN rm -f -t 0 -a >/dev/null 2>&1
	$PODMAN pod rm -f -t 0 -a >/dev/null 2>&1
}
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
	run run -d --name "$NAME" --network "${NETWORK:-none}" --pids-limit 0 $SECCOMP "$@" floe-test sh -c "$PROGRAM"
	counts
}
within() { $PODMAN exec "$NAME" "$@"; }

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
scenario_two_of_one_archive() {
	begin
	run container checkpoint --export "$PWD/archive" "$NAME"
	run rm -f "$NAME"
	run container restore --import "$PWD/archive" --name "$NAME-2"
	run container restore --import "$PWD/archive" --name "$NAME-3"
	NAME=$NAME-2
	counts
	NAME=${NAME%-2}-3
	counts
}
scenario_all() {
	begin
	run container checkpoint --all
	run container restore --all
	counts
}
scenario_keep() {
	begin
	run container checkpoint --keep "$NAME"
	run container restore --keep "$NAME"
	counts
	find storage -name inventory.img | grep -q checkpoint || fail "the images are not kept"
	find storage -name restore.log | grep -q . || fail "the log is not kept"
}
scenario_image() { # a checkpoint as an image of the local store
	begin
	run container checkpoint --create-image floe-checkpoint "$NAME"
	run rm -f "$NAME"
	run container restore --name "$NAME-2" floe-checkpoint
	NAME=$NAME-2
	counts
}
scenario_root_file_system() {
	begin --tmpfs /tmp
	run exec "$NAME" sh -c 'echo content >/written'
	run container checkpoint --export "$PWD/archive" "$NAME"
	run rm -f "$NAME"
	run container restore --import "$PWD/archive"
	counts
	[ "$($PODMAN exec "$NAME" cat /written)" = content ] || fail "what was written is not there"
}
scenario_ignore_rootfs() {
	begin --tmpfs /tmp
	run exec "$NAME" sh -c 'echo content >/written'
	run container checkpoint --ignore-rootfs --export "$PWD/archive" "$NAME"
	run rm -f "$NAME"
	run container restore --import "$PWD/archive"
	counts
	! $PODMAN exec "$NAME" cat /written >/dev/null 2>&1 || fail "what was written came with the archive"
}
scenario_volume() {
	mkdir data
	begin -v "$PWD/data:/data"
	run container checkpoint "$NAME"
	run container restore "$NAME"
	counts
}
scenario_volume_named() { # its content travels in the archive
	PROGRAM="echo content >/data/file; exec 9>>/data/file; $LOOP"
	begin -v "named:/data"
	run container checkpoint --export "$PWD/archive" "$NAME"
	run rm -f "$NAME"
	run volume rm named
	run container restore --import "$PWD/archive"
	counts
	[ "$($PODMAN exec "$NAME" cat /data/file)" = content ] || fail "the volume is empty"
}
scenario_ignore_volumes() {
	PROGRAM="echo content >/data/file; $LOOP"
	begin -v "named:/data"
	run container checkpoint --ignore-volumes --export "$PWD/archive" "$NAME"
	run rm -f "$NAME"
	run volume rm named
	run container restore --ignore-volumes --import "$PWD/archive"
	counts
	! $PODMAN exec "$NAME" cat /data/file >/dev/null 2>&1 || fail "the volume came with the archive"
}
scenario_terminal() {
	PROGRAM='i=0; while :; do i=$((i+1)); echo line $i; echo $i >/tmp/count; sleep 0.05; done'
	begin -t
	run container checkpoint "$NAME"
	run container restore "$NAME"
	counts
	before=$($PODMAN logs "$NAME" | wc -l)
	sleep 0.5
	[ "$($PODMAN logs "$NAME" | wc -l)" -gt "$before" ] || fail "nothing comes from the terminal"
}
scenario_file_locks() {
	copy "$(place flock)"
	flock=$(place flock)
	PROGRAM="exec 9>/tmp/lock; $flock 9 || exit; $LOOP"
	begin
	$PODMAN container checkpoint "$NAME" >printed 2>&1 && fail "a lock was saved without being asked for"
	counts
	run container checkpoint --file-locks "$NAME"
	run container restore --file-locks "$NAME"
	counts
	$PODMAN exec "$NAME" "$flock" -n /tmp/lock echo >/dev/null 2>&1 && fail "the lock is not held"
	$PODMAN exec "$NAME" "$flock" -n /tmp/other echo >printed 2>&1 || fail "no lock can be taken"
}
scenario_tcp_established() {
	PROGRAM=$TALK
	begin
	$PODMAN container checkpoint "$NAME" >printed 2>&1 && fail "a connection was saved without being asked for"
	counts
	run container checkpoint --tcp-established "$NAME"
	run container restore --tcp-established "$NAME"
	counts
}
scenario_tcp_close() { # the connections are gone, the program goes on and sees that
	PROGRAM=$TALK
	begin
	run container checkpoint --tcp-established --export "$PWD/archive" "$NAME"
	run rm -f "$NAME"
	$PODMAN container restore --help | grep -q tcp-close || { echo 'podman 4 has no --tcp-close'; exit 77; }
	$PODMAN container restore --tcp-close --import "$PWD/archive" >printed 2>&1 ||
		{ grep -q 'runc: flag provided but not defined' printed && fault 'podman passes --tcp-close to runc, which has no such option'; } ||
		fail "no restore"
	for i in 1 2 3 4 5 6 7 8 9 10; do
		$PODMAN exec "$NAME" cat /tmp/over >/dev/null 2>&1 && return
		sleep 0.2
	done
	fail "the connection still stands"
}
# Something that answers on port 99, and the loop.
ANSWER='while :; do echo here | nc -l -p 99; done & '
scenario_published_port() {
	NETWORK=bridge PROGRAM="$ANSWER$LOOP"
	begin -p 8099:99
	answers 8099
	address=$($PODMAN inspect -f '{{.NetworkSettings.IPAddress}}' "$NAME")
	run container checkpoint "$NAME"
	run container restore "$NAME"
	counts
	answers 8099
	now=$($PODMAN inspect -f '{{.NetworkSettings.IPAddress}}' "$NAME")
	[ "$now" = "$address" ] || fail "its address was $address and is $now"
}
scenario_published_elsewhere() { # from an archive, with another port
	NETWORK=bridge PROGRAM="$ANSWER$LOOP"
	begin -p 8099:99
	run container checkpoint --export "$PWD/archive" "$NAME"
	run rm -f "$NAME"
	run container restore --import "$PWD/archive" --publish 8100:99
	counts
	answers 8100
}
answers() { # PORT
	gateway=$("$BUSYBOX" ip -4 address | grep podman0 | sed -n 's|.*inet \([0-9.]*\)/.*|\1|p')
	for i in $(seq 20); do
		[ "$("$BUSYBOX" nc -w 1 "$gateway" "$1" </dev/null)" = here ] && return
		sleep 0.2
	done
	fail "nothing answers on port $1"
}
scenario_pod() {
	image
	run pod create --name floe-pod --infra-image floe-test --infra-command 'sleep 1000' --network none
	run run -d --pod floe-pod --name "$NAME" --pids-limit 0 $SECCOMP floe-test sh -c "$LOOP"
	counts
	run container checkpoint --export "$PWD/archive" "$NAME"
	run rm -f "$NAME"
	run pod rm -f -t 0 floe-pod
	run pod create --name floe-other --infra-image floe-test --infra-command 'sleep 1000' --network none
	run container restore --import "$PWD/archive" --pod "$($PODMAN pod inspect -f '{{.ID}}' floe-other)"
	counts
}
scenario_pod_in_place() {
	image
	run pod create --name floe-pod --infra-image floe-test --infra-command 'sleep 1000' --network none
	run run -d --pod floe-pod --name "$NAME" --pids-limit 0 $SECCOMP floe-test sh -c "$LOOP"
	counts
	run container checkpoint "$NAME"
	run container restore "$NAME"
	counts
}
scenario_user_namespace() {
	begin --uidmap 0:100000:65536 --gidmap 0:100000:65536
	run container checkpoint "$NAME"
	run container restore "$NAME"
	counts
}
scenario_seccomp() {
	SECCOMP=
	begin
	run container checkpoint "$NAME"
	run container restore "$NAME"
	counts
	$PODMAN exec "$NAME" cat /proc/1/status | grep -q 'Seccomp:.*2' || fail "the filter is gone"
}
scenario_overlay() {
	PODMAN="$PODMAN --storage-driver overlay"
	begin
	run exec "$NAME" sh -c 'echo content >/written'
	run container checkpoint --export "$PWD/archive" "$NAME"
	run rm -f "$NAME"
	run container restore --import "$PWD/archive"
	counts
	[ "$($PODMAN exec "$NAME" cat /written)" = content ] || fail "what was written is not there"
}
scenario_read_only() {
	begin --read-only --tmpfs /tmp
	run container checkpoint "$NAME"
	run container restore "$NAME"
	counts
}
scenario_privileged() {
	begin --privileged
	run container checkpoint "$NAME"
	run container restore "$NAME"
	counts
}
scenario_redis() { server redis; }
scenario_nginx() { server nginx; }
scenario_postgresql() { server postgresql; }
server() { # with a client that stays connected, and sends something while the container is not there
	files "$1"
	image
	run run -d --name "$NAME" --network host --pids-limit 0 --user 1000:1000 --security-opt seccomp=unconfined \
		floe-test sh -c "$PROGRAM"
	meet "$1" 127.0.0.1
	visit
	run container checkpoint --tcp-established "$NAME"
	question
	run container restore --tcp-established "$NAME"
	answer
	visit
	visit
}

"scenario_$1"
