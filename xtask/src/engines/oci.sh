# Scenarios of runc and crun: `sh oci.sh NAME`, in a directory of its own that is removed afterwards.
#
# ENGINE is the engine, XTASK this program; `criu` on PATH is the binary under test. A scenario prints why
# it failed and ends with 1, or why it cannot be tried and ends with 77.
set -u
. "${0%/*}/servers.sh"
ID=floe-$1-$$
CHECKPOINT= RESTORE= PROGRAM= EDIT= RUN=
LOOP='i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done'

fail() {
	echo "$*"
	cat "$PWD"/*/dump.log "$PWD"/*/restore.log 2>/dev/null | grep -a 'Error' | head -6
	head -c 600 "$PWD"/printed 2>/dev/null
	exit 1
}
end() {
	part
	$ENGINE kill "$ID" KILL >/dev/null 2>&1
	for i in 1 2 3 4 5 6 7 8 9 10; do
		$ENGINE delete -f "$ID" >/dev/null 2>&1 && break
		sleep 0.1
	done
	[ -z "${CONSOLE:-}" ] || kill "$CONSOLE" 2>/dev/null
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
scenario_ext_unix_sk() { begin; counts; CHECKPOINT=--ext-unix-sk RESTORE=--ext-unix-sk; cycle; }
scenario_cgroups_soft() { modes soft; }
scenario_cgroups_full() { modes full; }
scenario_cgroups_ignore() { modes ignore; }
modes() {
	begin
	counts
	CHECKPOINT="--manage-cgroups-mode $1" RESTORE="--manage-cgroups-mode $1"
	$ENGINE checkpoint --image-path "$PWD/tried" $CHECKPOINT --leave-running "$ID" 2>&1 |
		grep -q 'Invalid manage' && echo "the engine does not know the mode $1" && exit 77
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
scenario_lazy_pages() { # there are none yet: the refusal must be clear, and the container go on
	begin
	counts
	mkdir images
	$ENGINE checkpoint --lazy-pages --page-server 127.0.0.1:27000 --image-path "$PWD/images" \
		--work-path "$PWD/images" "$ID" >printed 2>&1 && fail "lazy pages are not there yet"
	counts
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
