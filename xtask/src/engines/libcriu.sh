# Programs that call `criu` themselves, through Debian's libraries for C and Python: `sh libcriu.sh NAME`, as in
# oci.sh.
set -u
CRIU=$(command -v criu)
DAEMON=

fail() {
	echo "$*"
	head -c 900 printed 2>/dev/null
	grep -ahs Error ./*/log | head -6
	exit 1
}
end() {
	[ -z "$DAEMON" ] || kill "$DAEMON"
}
trap end EXIT

by_c() { # SCENARIO
	gcc -Wall -o libcriu "${0%/*}/libcriu.c" -lcriu >printed 2>&1 || fail "it does not compile"
	./libcriu "$1" "$CRIU" "$PWD" >printed 2>&1 || fail "libcriu: $1"
}
scenario_questions() { by_c questions; }
scenario_dump_and_restore() { by_c dump_and_restore; }
scenario_pre_dump() { by_c pre_dump; }
scenario_restore_child() { by_c restore_child; }
scenario_iterations() { by_c iterations; }
scenario_refusals() { by_c refusals; }
scenario_service() {
	"$CRIU" service --address "$PWD/service.socket" >printed 2>&1 &
	DAEMON=$!
	for i in $(seq 100); do
		[ -S service.socket ] && break
		sleep 0.05
	done
	by_c service
}
scenario_python() {
	setsid sh -c 'exec </dev/null >/dev/null 2>&1; i=0; while :; do i=$((i+1)); echo $i >count; sleep 0.05; done' &
	pid=$!
	sleep 0.5
	python3 - "$CRIU" "$pid" >printed 2>&1 <<-'PYTHON' || fail "pycriu"
		import os, sys, time
		import pycriu

		def caller(directory):
		    os.makedirs(directory, exist_ok=True)
		    caller = pycriu.criu()
		    caller.use_binary(sys.argv[1])
		    caller.opts.images_dir_fd = os.open(directory, os.O_DIRECTORY)
		    caller.opts.log_level = 4
		    caller.opts.log_file = "log"
		    return caller

		caller("images").check()
		failing = caller("images")
		failing.opts.pid = 4000000
		try:
		    failing.dump()
		    sys.exit("a program that does not exist was saved")
		except pycriu.CRIUExceptionExternal as error:
		    print(error)
		dumping = caller("images")
		dumping.opts.pid = int(sys.argv[2])
		dumping.dump()
		before = int(open("count").read() or 0)
		restored = caller("images").restore()
		assert restored.pid == int(sys.argv[2]), restored
		for i in range(100):
		    time.sleep(0.05)
		    if int(open("count").read() or 0) > before:
		        break
		else:
		    sys.exit("it does not go on")
		os.kill(restored.pid, 9)
	PYTHON
	python3 -m crit info images/inventory.img >printed 2>&1 || python3 -m crit show images/inventory.img >printed 2>&1 ||
		fail "crit does not read the images"
}

"scenario_$1"
