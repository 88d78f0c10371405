# Whether the program of a container goes on counting. Scripts say by `within COMMAND` how to run one in it.
count() { # it may be empty for a moment
	for try in 1 2 3 4 5; do
		counted=$(within tail -n 1 /tmp/count 2>/dev/null)
		[ -n "$counted" ] && break
	done
	echo "$counted"
}
counts() {
	for i in 1 2 3 4 5; do
		before=$(count)
		sleep 0.3
		after=$(count)
		[ -n "$before" ] && [ "${after:-0}" -gt "$before" ] && return 0
	done
	fail "the program does not go on: ${before:-nothing} and ${after:-nothing}"
}
