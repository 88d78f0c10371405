# Real servers for the scenarios of all engines: their files, and a client that stays connected.
#
# `files NAME` fills the directory r and sets PROGRAM, which runs as user 1000; `meet NAME ADDRESS` connects;
# every `visit` writes through the connection and checks all that was written before.
VISITS=0 CLIENT=

lacks() {
	echo "$1 is not installed"
	exit 77
}
place() { # COMMAND: where it is
	PATH=$(echo /usr/lib/postgresql/*/bin | tr ' ' ':'):$PATH command -v "$1" || true
}
copy() { # PROGRAM...: with the libraries that they need
	for program in "$@"; do
		[ -e "$program" ] || lacks "$program"
		{ echo "$program"; ldd "$program" | grep -o '/[^ ]*'; } | while read -r file; do
			[ -e "r$file" ] && continue
			mkdir -p "r${file%/*}"
			cp -L "$file" "r$file"
		done
	done
}
files() { # SERVER
	mkdir -p r/tmp r/etc
	chmod 1777 r/tmp
	echo 'server:x:1000:1000::/tmp:/bin/sh' >r/etc/passwd
	echo 'server:x:1000:' >r/etc/group
	case $1 in
	redis)
		copy "$(place redis-server)"
		PROGRAM="exec $(place redis-server) --port 6399 --save '' --protected-mode no --dir /tmp"
		;;
	nginx)
		copy "$(place nginx)"
		mkdir -p r/var/log/nginx
		cat >r/etc/nginx.conf <<-'CONF'
			daemon off; pid /tmp/pid; error_log /tmp/errors; worker_processes 2; events {}
			http {
				access_log off; keepalive_timeout 600;
				client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/fastcgi;
				uwsgi_temp_path /tmp/uwsgi; scgi_temp_path /tmp/scgi;
				server { listen 8399; location / { return 200 "$uri\n"; } }
			}
		CONF
		PROGRAM="exec $(place nginx) -c /etc/nginx.conf -e /tmp/errors"
		;;
	postgresql)
		command -v psql >/dev/null || lacks psql
		copy "$(place initdb)" "$(place postgres)"
		directory=$(place postgres)
		directory=${directory%/bin/postgres}
		version=${directory##*/}
		mkdir -p "r$directory" r/usr/share/postgresql r/usr/share/zoneinfo/Etc
		cp -a "$directory/lib" "r$directory/"
		cp -aL "/usr/share/postgresql/$version" r/usr/share/postgresql/
		cp -L /usr/share/zoneinfo/UTC r/usr/share/zoneinfo/ 2>/dev/null
		cp -L /usr/share/zoneinfo/UTC r/usr/share/zoneinfo/Etc/ 2>/dev/null
		PROGRAM="export TZ=UTC; $directory/bin/initdb -D /tmp/data -U server -A trust -N >/tmp/initdb 2>&1 &&
			echo 'host all all all trust' >> /tmp/data/pg_hba.conf &&
			exec $directory/bin/postgres -D /tmp/data -k /tmp -p 5499 -h 0.0.0.0 >/tmp/postgres 2>&1"
		;;
	esac
}
meet() { # SERVER ADDRESS
	SERVER=$1
	case $1 in
	redis) wait_for "$2" 6399 && set -- "$BUSYBOX" nc "$2" 6399 ;;
	nginx) wait_for "$2" 8399 && set -- "$BUSYBOX" nc "$2" 8399 ;;
	postgresql) wait_for "$2" 5499 && set -- env PGSSLMODE=disable psql -h "$2" -p 5499 -U server -d postgres -qAt ;;
	esac
	mkfifo questions
	"$@" <questions >answers 2>errors &
	CLIENT=$!
	exec 8>questions
	[ $SERVER = postgresql ] && echo 'CREATE TEMP TABLE visits (visit int);' >&8
	visit
}
wait_for() { # ADDRESS PORT
	for i in $(seq 150); do
		"$BUSYBOX" nc -w 1 "$1" "$2" </dev/null >/dev/null 2>&1 && return
		sleep 0.2
	done
	fail "the server does not answer"
}
question() {
	VISITS=$((VISITS + 1))
	case $SERVER in
	redis) printf 'INCR visits\r\n' >&8 ;;
	nginx) printf 'GET /visit%d HTTP/1.1\r\nHost: test\r\n\r\n' $VISITS >&8 ;;
	postgresql) echo "INSERT INTO visits VALUES ($VISITS); SELECT 'visits', count(*), sum(visit) FROM visits;" >&8 ;;
	esac
}
answer() {
	case $SERVER in
	redis) expected="^:$VISITS" ;;
	nginx) expected="^/visit$VISITS\$" ;;
	postgresql) expected="^visits|$VISITS|$((VISITS * (VISITS + 1) / 2))\$" ;;
	esac
	for i in $(seq 150); do
		tr -d '\r' <answers | grep -q "$expected" && return
		kill -0 $CLIENT 2>/dev/null || break
		sleep 0.1
	done
	cat errors
	tail -n 3 answers
	fail "no answer to visit $VISITS"
}
visit() { question && answer; }
part() {
	[ -z "$CLIENT" ] && return
	exec 8>&-
	kill "$CLIENT" 2>/dev/null
}
