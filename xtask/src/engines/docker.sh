# Scenarios of docker: `sh docker.sh NAME`, as in oci.sh. Each has a daemon of its own in its directory.
set -u
. "${0%/*}/servers.sh"
. "${0%/*}/counting.sh"
NAME=floe-$1-$$
export DOCKER_HOST=unix://$PWD/socket
export TMPDIR=$PWD
LOOP='i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done'
DAEMON=

fail() {
	echo "$*"
	head -c 900 printed 2>/dev/null
	find . -name dump.log -o -name restore.log 2>/dev/null | while read -r log; do
		grep -a 'Error' "$log" | head -6
	done
	exit 1
}
# An engine fault: what docker itself does wrong, and no criu can mend.
fault() {
	grep -q "$1" printed || fail "docker failed otherwise than by its known fault"
	echo "engine fault: $2"
	exit 78
}
end() {
	part
	docker rm -f $(docker ps -aq 2>/dev/null) >/dev/null 2>&1
	[ -z "$DAEMON" ] && return
	kill "$DAEMON"
	wait "$DAEMON"
	umount data exec/netns/default 2>/dev/null
}
trap end EXIT
run() { docker "$@" >printed 2>&1 || fail "docker $*"; }

daemon() { # OPTIONS...
	dockerd --host "$DOCKER_HOST" --data-root "$PWD/data" --exec-root "$PWD/exec" --pidfile "$PWD/pid" \
		--experimental "$@" >daemon.log 2>&1 &
	DAEMON=$!
	for i in $(seq 200); do
		docker version >/dev/null 2>&1 && return
		sleep 0.1
	done
	tail -n 3 daemon.log
	fail "the daemon does not start"
}
image() {
	mkdir -p r/bin r/proc r/sys r/dev r/tmp r/etc r/run
	cp "$BUSYBOX" r/bin/busybox
	for applet in sh sleep echo cat nc tail tty; do ln -s busybox r/bin/$applet; done
	tar -C r -c . | docker import - floe-test >printed 2>&1 || fail "no image"
}
begin() { # OPTIONS...
	daemon --iptables=false --ip6tables=false --bridge=none
	image
	run run -d --name "$NAME" --network "${NETWORK:-host}" "$@" floe-test sh -c "${PROGRAM:-$LOOP}"
	counts
}
within() { docker exec "$NAME" "$@"; }
# Docker says that a checkpoint is made before it has seen the container end.
stopped() {
	for i in $(seq 50); do
		[ "$(docker inspect -f '{{.State.Running}}' "$NAME")" = false ] && return
		sleep 0.1
	done
	fail "it still runs"
}
# The daemon passes the images through containerd's store, from which those of the checkpoint may not be gone.
start() { # CHECKPOINT
	for i in $(seq 30); do
		docker start --checkpoint "$1" "$NAME" >printed 2>&1 && return
		grep -q 'commit failed.*already exists' printed || break
		sleep 0.3
	done
	return 1
}
cycle() {
	stood=$(count)
	run checkpoint create "$NAME" "${1:-first}"
	stopped
	start "${1:-first}" || fail "no restore"
	counts
	[ "$after" -ge "$stood" ] || fail "it began anew"
}

scenario_restore() { begin; cycle; }
scenario_twice() { begin; cycle; cycle second; }
scenario_leave_running() {
	begin
	run checkpoint create --leave-running "$NAME" first
	counts
	run kill "$NAME"
	stopped
	start first || fail "no restore"
	counts
}
scenario_checkpoint_directory() {
	begin
	mkdir elsewhere
	run checkpoint create --checkpoint-dir "$PWD/elsewhere" "$NAME" first
	stopped
	[ -e elsewhere/first/inventory.img ] || [ -e "$(find elsewhere -name inventory.img)" ] || fail "no images"
	# The daemon of docker refuses the directory at a start.
	docker start --checkpoint-dir "$PWD/elsewhere" --checkpoint first "$NAME" >printed 2>&1 && counts && return
	fault 'custom checkpointdir is not supported' 'a start takes no --checkpoint-dir'
}
scenario_list_and_remove() {
	begin
	run checkpoint create --leave-running "$NAME" first
	run checkpoint create --leave-running "$NAME" second
	run checkpoint ls "$NAME"
	grep -q first printed && grep -q second printed || fail "one is not listed"
	run checkpoint rm "$NAME" first
	run checkpoint ls "$NAME"
	grep -q first printed && fail "it is still listed"
	counts
}
scenario_terminal() { begin -t; cycle; }
scenario_standard_input() { begin -i; cycle; }
scenario_output() {
	PROGRAM='i=0; while :; do i=$((i+1)); echo $i; echo $i > /tmp/count; sleep 0.05; done'
	begin
	cycle
	docker logs "$NAME" >before 2>&1
	sleep 0.5
	docker logs "$NAME" >after 2>&1
	[ "$(wc -l <after)" -gt "$(wc -l <before)" ] || fail "nothing more is logged"
}
scenario_volume() {
	mkdir shared
	PROGRAM='i=0; while :; do i=$((i+1)); echo $i > /tmp/count; echo $i > /shared/count; echo $i > /named/count; sleep 0.05; done'
	begin -v "$PWD/shared:/shared" -v named:/named
	cycle
	before=$(cat shared/count)
	sleep 0.5
	[ "$(cat shared/count)" -gt "$before" ] || fail "the volume is not written"
}
scenario_read_only() { begin --read-only --tmpfs /tmp; cycle; }
scenario_limits() { begin --memory 64m --pids-limit 50; cycle; }
scenario_init() { begin --init; cycle; }
scenario_user() { begin --user 1000:1000 --tmpfs /tmp:mode=1777; cycle; }
scenario_privileged() { begin --privileged; cycle; }
scenario_network_none() {
	NETWORK=none
	begin
	run checkpoint create "$NAME" first
	stopped
	start first && counts && return
	fault '/proc/0/ns/net' 'docker binds /proc/0/ns/net when it restores a container with a network of its own'
}
scenario_network_bridge() {
	daemon --ip6tables=false
	image
	run run -d --name "$NAME" -p 127.0.0.1:8099:99 floe-test sh -c "$LOOP"
	counts
	run checkpoint create "$NAME" first
	stopped
	start first && counts && return
	fault '/proc/0/ns/net' 'docker binds /proc/0/ns/net when it restores a container with a network of its own'
}
scenario_tcp_refused() {
	PROGRAM='sleep 1000 | nc -l -p 99 > /tmp/count & sleep 0.5;
		i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done | nc 127.0.0.1 99; sleep 100'
	begin
	docker checkpoint create "$NAME" first >printed 2>&1 && fail "a connection was saved without being asked for"
	counts
}
# Docker has no option for connections: only the file says that they are wanted.
configuration() {
	mkdir -p /run/etc/criu
	cp -a /etc/. /run/etc/
	mount --bind /run/etc /etc
	echo tcp-established >/etc/criu/runc.conf
}
scenario_tcp_by_configuration() {
	configuration
	PROGRAM='sleep 1000 | nc -l -p 99 > /tmp/connection & sleep 0.5;
		i=0; while :; do i=$((i+1)); echo $i; tail -n 1 /tmp/connection > /tmp/count; sleep 0.05; done | nc 127.0.0.1 99; sleep 100'
	begin
	cycle
}
scenario_redis() { server redis; }
scenario_nginx() { server nginx; }
scenario_postgresql() { server postgresql; }
server() { # with a client that stays connected, and sends something while the container is not there
	configuration
	files "$1"
	daemon --iptables=false --ip6tables=false --bridge=none
	image
	run run -d --name "$NAME" --network host --user 1000:1000 floe-test sh -c "$PROGRAM"
	meet "$1" 127.0.0.1
	visit
	run checkpoint create "$NAME" first
	stopped
	question
	start first || fail "no restore"
	answer
	visit
}

"scenario_$1"
