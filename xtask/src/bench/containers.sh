# One checkpoint and restore of redis with 256 MiB under podman: `sh containers.sh`, in a directory of its own.
#
# `criu` on PATH does the work. Prints the milliseconds of checkpoint and restore, and for how long redis did
# not answer.
set -u
fail() {
	echo "$*"
	tail -n 4 printed 2>/dev/null
	find . -name dump.log -o -name restore.log 2>/dev/null | while read -r log; do
		grep -a Error "$log" | tail -n 3
	done
	exit 1
}
. "${0%/*}/servers.sh"
export TMPDIR=$PWD CONTAINERS_CONF=/dev/null
PODMAN="podman --runtime runc --root $PWD/storage --runroot $PWD/run --cgroup-manager cgroupfs"
PODMAN="$PODMAN --events-backend file --storage-driver vfs --tmpdir $PWD/tmp"
POLLER=
end() {
	[ -z "$POLLER" ] || kill "$POLLER"
	$PODMAN rm -f -t 0 -a >/dev/null 2>&1
}
trap end EXIT
run() { $PODMAN "$@" >printed 2>&1 || fail "podman $*"; }
now() { date +%s%N; }

cp "$BUSYBOX" "${TMPDIR}/sh" && mkdir -p r/bin r/proc r/sys r/dev r/run && mv "$TMPDIR/sh" r/bin/sh
files redis
tar -C r -c . | $PODMAN import - floe-test >printed 2>&1 || fail "no image"
run run -d --name redis --network host --pids-limit 0 --security-opt seccomp=unconfined floe-test sh -c "$PROGRAM"
wait_for 127.0.0.1 6399
redis-cli -p 6399 EVAL "for i = 1, 65536 do redis.call('SET', 'k' .. i, string.rep(tostring(i % 10), 4000)) end return 1" 0 \
	>printed 2>&1 || fail "redis cannot be filled"
"$XTASK" poll 127.0.0.1:6399 gaps &
POLLER=$!
while [ ! -s gaps ]; do sleep 0.02; done
began=$(now)
run container checkpoint --tcp-established redis
between=$(now)
run container restore --tcp-established redis
ended=$(now)
sleep 0.5
[ "$(redis-cli -p 6399 DBSIZE)" = 65536 ] || fail "keys are lost"
echo "$(((between - began) / 1000)) $(((ended - between) / 1000)) $(sort -n gaps | tail -n 1)"
