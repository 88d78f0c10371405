# Scenarios of runc and crun: `sh oci.sh NAME`, in a directory of its own that is removed afterwards.
#
# ENGINE is the engine, XTASK this program; `criu` on PATH is the binary under test. A scenario prints why
# it failed and ends with 1, or why it cannot be tried and ends with 77.
set -u
. "${0%/*}/servers.sh"
ID=floe-$1-$$
CHECKPOINT= RESTORE= PROGRAM= EDIT= RUN= CONSOLES=
LOOP='i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done'

fail() {
	echo "$*"
	cat "$PWD"/*/dump.log "$PWD"/*/restore.log 2>/dev/null | grep -a 'Error' | head -6
	head -c 600 "$PWD"/printed 2>/dev/null
	exit 1
}
# What the engine itself does wrong, and no criu can mend.
fault() {
	echo "engine fault: $*"
	exit 78
}
end() {
	part
	$ENGINE kill "$ID" KILL >/dev/null 2>&1
	for i in 1 2 3 4 5 6 7 8 9 10; do
		$ENGINE delete -f "$ID" >/dev/null 2>&1 && break
		sleep 0.1
	done
	[ -z "${CONSOLE:-}$CONSOLES" ] || kill ${CONSOLE:-} $CONSOLES 2>/dev/null
}
trap end EXIT

# A bundle whose program is $1; EDIT is a perl expression on its configuration.
bundle() {
	[ ! -d r ] || { mkdir b && mv r b/rootfs; }
	mkdir -p b/rootfs/bin b/rootfs/proc b/rootfs/sys b/rootfs/dev b/rootfs/tmp
	cp "$BUSYBOX" b/rootfs/bin/busybox
	for applet in sh sleep echo cat nc tty true; do ln -s busybox b/rootfs/bin/$applet; done
	(cd b && $ENGINE spec) || fail "no configuration"
	PROGRAM="$1" perl -0pi -e '
		s/"terminal": true/"terminal": false/; s/"readonly": true/"readonly": false/;
		$p = $ENV{PROGRAM}; $p =~ s/(["\\])/\\$1/g;
		$p =~ s/\n\s*/ /g;
		s/"args": \[.*?\]/"args": ["sh", "-c", "$p"]/s;' b/config.json
	[ -z "$EDIT" ] || perl -0pi -e "$EDIT" b/config.json
}
begin() {
	bundle "${1:-$LOOP}"
	$ENGINE run -d $RUN -b b "$ID" </dev/null >/dev/null 2>/dev/null || fail "it does not start: $($ENGINE run -d $RUN -b b "$ID-2" 2>&1 </dev/null)"
}
checkpoint() { # IMAGES OPTIONS...
	images=$1
	shift
	mkdir -p "$images"
	$ENGINE checkpoint --image-path "$PWD/$images" --work-path "$PWD/$images" "$@" $CHECKPOINT "$ID" \
		>printed 2>&1 || fail "checkpoint failed"
}
restore() { # IMAGES OPTIONS...
	images=$1
	shift
	$ENGINE restore -d --image-path "$PWD/$images" --work-path "$PWD/$images" -b b "$@" $RESTORE "$ID" \
		</dev/null >/dev/null 2>/dev/null || fail "restore failed"
}
# The number that the program has counted to by now, in FILE.
count() {
	for try in 1 2 3 4 5 6 7 8 9; do # it may be empty for a moment
		counted=$(tail -n 1 "b/rootfs/tmp/${1:-count}" 2>/dev/null)
		[ -n "$counted" ] && break
	done
	echo "$counted"
}
counts() { # whether it goes on counting
	for i in 1 2 3 4 5 6 7 8 9 10; do
		before=$(count "${1:-count}")
		sleep 0.3
		after=$(count "${1:-count}")
		[ -n "$before" ] && [ "${after:-0}" -gt "$before" ] && return 0
	done
	fail "the program does not go on: ${before:-nothing} and ${after:-nothing}"
}
cycle() {
	checkpoint images
	stood=$(count "${1:-count}")
	restore images
	counts "${1:-count}"
	now=$(count "${1:-count}")
	# A program may be stopped between emptying its file and writing to it.
	[ "${now:-0}" -gt "${stood:-0}" ] || fail "it began anew"
}

scenario_restore() { begin; counts; cycle; }
scenario_twice() { begin; counts; cycle; checkpoint again; restore again; counts; }
scenario_leave_running() {
	begin
	counts
	checkpoint images --leave-running
	counts
	end
	restore images
	counts
}
scenario_pre_dump() {
	begin
	counts
	checkpoint first --pre-dump
	counts
	checkpoint second --pre-dump --parent-path ../first
	counts
	checkpoint images --parent-path ../second
	restore images
	counts
}
scenario_tcp_established() {
	begin 'sleep 1000 | nc -l -p 99 > /tmp/count & sleep 0.5;
		i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done | nc 127.0.0.1 99; sleep 100'
	counts
	CHECKPOINT=--tcp-established RESTORE=--tcp-established
	cycle
}
scenario_file_locks() {
	copy "$(place flock)"
	flock=$(place flock)
	begin "exec 9>/tmp/lock; $flock 9 || exit; $LOOP"
	counts
	mkdir refused
	$ENGINE checkpoint --image-path "$PWD/refused" --work-path "$PWD/refused" "$ID" >printed 2>&1 &&
		fail "a lock was saved without being asked for"
	counts
	CHECKPOINT=--file-locks RESTORE=--file-locks
	cycle
	$ENGINE exec "$ID" "$flock" -n /tmp/lock true && fail "the lock is not held"
	$ENGINE exec "$ID" "$flock" -n /tmp/other true || fail "no lock can be taken"
}
scenario_ext_unix_sk() { # a socket of the container is connected to one outside, which has one name for both
	mkdir outside r
	perl -MIO::Socket::UNIX -e '$| = 1; $s = IO::Socket::UNIX->new(Type => SOCK_DGRAM, Local => "$ENV{PWD}/outside/socket") or die;
		while (defined $s->recv($got, 99)) { print $got }' >heard &
	CONSOLES=$!
	copy "$XTASK"
	while [ ! -S outside/socket ]; do sleep 0.02; done
	EDIT='s|"mounts": \[|"mounts": [{"destination": "$ENV{PWD}/outside", "type": "bind", "source": "$ENV{PWD}/outside", "options": ["bind"]},|'
	begin "exec $XTASK tick $PWD/outside/socket /tmp/count"
	counts
	mkdir refused
	$ENGINE checkpoint --image-path "$PWD/refused" --work-path "$PWD/refused" "$ID" >printed 2>&1 &&
		fail "a connection to the outside was saved without being asked for"
	counts
	CHECKPOINT=--ext-unix-sk RESTORE=--ext-unix-sk
	cycle
	before=$(wc -l <heard)
	sleep 0.3
	[ "$(wc -l <heard)" -gt "$before" ] || fail "nothing arrives outside"
}
scenario_cgroups_soft() { modes soft; }
scenario_cgroups_full() { modes full; }
scenario_cgroups_ignore() { modes ignore; }
scenario_cgroups_strict() { # the mode takes no group that exists already
	[ "$ENGINE" != runc ] || fault 'runc makes the group itself, which the mode strict then refuses'
	modes strict
}
modes() {
	begin
	counts
	CHECKPOINT="--manage-cgroups-mode $1" RESTORE="--manage-cgroups-mode $1"
	$ENGINE checkpoint --image-path "$PWD/tried" $CHECKPOINT --leave-running "$ID" 2>&1 |
		grep -qi 'invalid manage\|unknown.*manage\|invalid cgroup' && echo "the engine does not know the mode $1" && exit 77
	cycle
}
scenario_terminal() {
	EDIT='s/"terminal": false/"terminal": true/'
	"$XTASK" console console.sock tty1 &
	CONSOLE=$!
	while [ ! -S console.sock ]; do sleep 0.02; done
	RUN="--console-socket $PWD/console.sock"
	begin 'tty > /tmp/tty; i=0; while :; do i=$((i+1)); echo $i; echo $i > /tmp/count; sleep 0.05; done'
	counts
	checkpoint images
	kill $CONSOLE
	rm -f console.sock
	"$XTASK" console console.sock tty2 &
	CONSOLE=$!
	while [ ! -S console.sock ]; do sleep 0.02; done
	restore images --console-socket "$PWD/console.sock"
	counts
	[ -s tty2 ] || fail "nothing comes from the terminal"
}
# The terminal of a job: the container's program has the one that the engine was started from.
scenario_shell_job() {
	bundle 'i=0; while :; do i=$((i+1)); echo line $i; echo $i > /tmp/count; sleep 0.05; done'
	on_terminal tty1 "$ENGINE run -d -b b $ID; sleep 1000"
	counts
	grep -q line tty1 || fail "it has no terminal"
	checkpoint images --shell-job
	kill $TERMINAL
	on_terminal tty2 "$ENGINE restore -d --shell-job --image-path $PWD/images --work-path $PWD/images -b b $ID; sleep 1000"
	counts
	grep -q line tty2 || fail "nothing comes from the new terminal"
}
# A terminal of its own, whose master the engine holds as long as it runs.
scenario_terminal_attached() {
	EDIT='s/"terminal": false/"terminal": true/'
	bundle 'i=0; while :; do i=$((i+1)); echo line $i; echo $i > /tmp/count; sleep 0.05; done'
	on_terminal tty1 "$ENGINE run -b b $ID"
	counts
	checkpoint images
	on_terminal tty2 "$ENGINE restore --image-path $PWD/images --work-path $PWD/images -b b $ID"
	counts
	[ "$ENGINE" != crun ] || grep -q line tty2 || fault 'crun drops the terminal that it is given where it has no console socket'
	grep -q line tty2 || fail "nothing comes from the new terminal"
}
on_terminal() { # OUTPUT COMMAND
	script -q -f -c "$2" "$1" </dev/null >/dev/null 2>&1 &
	TERMINAL=$!
	CONSOLES="$CONSOLES $TERMINAL"
}
scenario_work_path() { # logs and statistics lie apart from the images
	begin
	counts
	mkdir images work
	$ENGINE checkpoint --image-path "$PWD/images" --work-path "$PWD/work" "$ID" >printed 2>&1 || fail "checkpoint failed"
	[ -s work/dump.log ] && [ -s work/stats-dump ] || fail "no log or statistics in the work directory"
	[ ! -e images/dump.log ] || fail "the log lies with the images"
	$ENGINE restore -d --image-path "$PWD/images" --work-path "$PWD/work" -b b "$ID" </dev/null >/dev/null 2>&1 ||
		fail "restore failed"
	[ -s work/restore.log ] || fail "no log of the restore"
	counts
}
scenario_pipes() {
	bundle 'i=0; while :; do i=$((i+1)); echo $i; echo $i > /tmp/count; sleep 0.05; done'
	$ENGINE run -d -b b "$ID" </dev/null 2>/dev/null | cat >out1 &
	counts
	checkpoint images
	$ENGINE restore -d --image-path "$PWD/images" --work-path "$PWD/images" -b b "$ID" \
		</dev/null 2>/dev/null | cat >out2 &
	counts
	[ -s out2 ] || fail "nothing comes through the new pipe"
}
scenario_user_namespace() {
	EDIT='s/"namespaces": \[/"uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
		"gidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
		"namespaces": [{"type": "user"},/'
	mkdir -p b/rootfs/tmp
	chmod 777 b/rootfs/tmp
	chmod 755 . b b/rootfs
	begin
	counts
	cycle
}
scenario_container_inside() { # it counts as long as its /proc shows it as the first process
	EDIT='s|"CAP_KILL"|"CAP_KILL", "CAP_SYS_ADMIN"|g; s|"noNewPrivileges": true|"noNewPrivileges": false|'
	begin "busybox unshare -p -f --mount-proc sh -c 'i=0; while busybox grep -q first /proc/1/cmdline; do
		i=\$((i+1)); echo \$i > /tmp/count; sleep 0.05; done' first"
	counts
	cycle
	checkpoint again
	restore again
	counts
}
scenario_lazy_pages() { # the second container fetches the memory of the first
	begin
	counts
	mkdir images work
	$ENGINE checkpoint --lazy-pages --page-server 127.0.0.1:27000 --status-fd 5 --image-path "$PWD/images" \
		--work-path "$PWD/work" "$ID" 5>status >printed 2>&1 &
	saving=$!
	while [ ! -s status ] && kill -0 $saving 2>/dev/null; do sleep 0.05; done
	if [ ! -s status ]; then # refused: clearly, and the container goes on
		counts
		reason=$(grep -i -m 1 'lazy\|missing features' printed) || fail "refused without a word on lazy pages"
		echo "refused: ${reason##*msg=}"
		exit 77
	fi
	stood=$(count)
	criu lazy-pages --page-server --address 127.0.0.1 --port 27000 -D images -W work -o lazy.log >/dev/null 2>&1 &
	CONSOLES=$!
	first=$ID
	ID=$ID-2
	$ENGINE restore -d --lazy-pages --image-path "$PWD/images" --work-path "$PWD/work" -b b "$ID" \
		</dev/null >/dev/null 2>&1 || fail "restore failed"
	counts
	[ "$(count)" -gt "$stood" ] || fail "it began anew"
	wait $saving || fail "the checkpoint failed"
	$ENGINE delete -f "$first" >/dev/null 2>&1
}
# A whole system: its manager with groups, watches and timers, a service with mounts and names of its own.
# Units that have BPF programs are left out: nobody can read those back.
scenario_systemd() {
	[ -x /usr/lib/systemd/systemd ] || lacks systemd
	version=$(/usr/lib/systemd/systemd --version | sed -n 's/^systemd \([0-9]*\).*/\1/p')
	if [ "${version:-0}" -ge 256 ] && grep -qv '^0::' /proc/self/cgroup; then
		echo "systemd $version does not start beside control groups of version 1"
		exit 77
	fi
	mkdir -p r/usr r/run r/etc/systemd/system
	ln -s usr/lib r/lib
	ln -s usr/lib64 r/lib64
	ln -s usr/sbin r/sbin
	echo 0123456789abcdef0123456789abcdef >r/etc/machine-id
	echo 'root:x:0:0::/:/bin/sh' >r/etc/passwd
	echo 'root:x:0:' >r/etc/group
	service count "ExecStart=/bin/busybox sh -c '$(echo "$LOOP" | sed 's/[$]/$$/g; s/%/%%/g')'"
	service private "ExecStart=/bin/busybox unshare -m -u /bin/busybox sleep 10000"
	printf '[Unit]\nDefaultDependencies=no\nWants=count.service private.service\n' >r/etc/systemd/system/floe.target
	EDIT='s|"mounts": \[|"mounts": [{"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
			{"destination": "/run", "type": "tmpfs", "source": "run"},|;
		s|("destination": "/sys/fs/cgroup".*?)"ro"|$1"rw"|s;
		s|\{\s*"type": "cgroup"\s*\},?||; s|,(\s*\])|$1|g;
		s|"namespaces": \[|"cgroupsPath": "/floe-$ENV{ID}", "namespaces": [{"type": "cgroup"},|;
		s|"CAP_KILL"|"CAP_KILL", "CAP_SYS_ADMIN", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_SETUID", "CAP_SETGID"|g;
		s|"noNewPrivileges": true|"noNewPrivileges": false|'
	export ID
	begin 'export container=oci; exec /usr/lib/systemd/systemd --unit=floe.target'
	counts
	answers "before the checkpoint"
	CHECKPOINT="--manage-cgroups-mode full --file-locks" RESTORE="--manage-cgroups-mode full --file-locks"
	cycle
	answers "after the restore"
	$ENGINE exec "$ID" /usr/bin/systemctl restart private count || fail "no service can be started anew"
	counts
}
answers() {
	state=$($ENGINE exec "$ID" /usr/bin/systemctl is-active private)
	[ "$state" = active ] || fail "the manager $1 says of a service: $state"
}
service() { # NAME LINES
	printf '[Unit]\nDefaultDependencies=no\n[Service]\nStandardOutput=null\n%s\n' "$2" | tr -d '\t' >"r/etc/systemd/system/$1.service"
}
scenario_redis() { server redis; }
scenario_nginx() { server nginx; }
scenario_postgresql() { server postgresql; }
server() { # with a client that stays connected, and sends something while the container is not there
	files "$1"
	EDIT='s/\{\s*"type": "network"\s*\},?//; s/"uid": 0/"uid": 1000/; s/"gid": 0/"gid": 1000/'
	begin "$PROGRAM"
	meet "$1" 127.0.0.1
	visit
	checkpoint images --tcp-established
	question
	restore images --tcp-established
	answer
	visit
}

"scenario_$1"
