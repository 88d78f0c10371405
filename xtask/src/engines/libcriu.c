/*
 * A caller of libcriu: `libcriu SCENARIO CRIU DIRECTORY`, as others link it.
 *
 * The program that is saved is a child which counts in a file. Ends with 0, or says what was not as promised.
 */
#include <criu/criu.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition, ...) \
	do { \
		if (!(condition)) { \
			fprintf(stderr, __VA_ARGS__); \
			fprintf(stderr, ": %s\n", strerror(errno)); \
			exit(1); \
		} \
	} while (0)

static char notified[4096];

static int notify(char *action, criu_notify_arg_t argument)
{
	snprintf(notified + strlen(notified), sizeof(notified) - strlen(notified), "%s ", action);
	if (!strcmp(action, "setup-namespaces"))
		CHECK(criu_notify_pid(argument) > 0, "no pid with %s", action);
	return 0;
}

static int count(void)
{
	char text[32] = "";
	int fd = open("count", O_RDONLY);
	if (fd >= 0 && read(fd, text, sizeof(text) - 1) < 0)
		text[0] = 0;
	close(fd);
	return atoi(text);
}

static void counts(int above)
{
	for (int i = 0; i < 200; i++) {
		if (count() > above)
			return;
		usleep(20000);
	}
	CHECK(false, "the program does not count beyond %d", above);
}

static pid_t start(void)
{
	pid_t pid = fork();
	CHECK(pid >= 0, "fork");
	if (pid)
		return pid;
	setsid();
	int null = open("/dev/null", O_RDWR), file = open("count", O_RDWR | O_CREAT, 0600);
	for (int fd = 0; fd < 3; fd++)
		dup2(null, fd);
	dup2(file, 3);
	for (int fd = 4; fd < 64; fd++)
		close(fd);
	for (int i = 1;; i++) {
		char text[32];
		snprintf(text, sizeof(text), "%-16d", i);
		if (pwrite(3, text, 16, 0) != 16)
			_exit(1);
		usleep(5000);
	}
}

static int images(const char *name)
{
	CHECK(!mkdir(name, 0700) || errno == EEXIST, "%s", name);
	int fd = open(name, O_DIRECTORY | O_CLOEXEC);
	CHECK(fd >= 0, "%s", name);
	return fd;
}

static const char *binary;
static bool by_socket;

static void options(const char *directory, pid_t pid)
{
	CHECK(!criu_init_opts(), "criu_init_opts");
	if (by_socket) {
		criu_set_service_address("service.socket");
	} else {
		criu_set_service_binary(binary);
	}
	criu_set_images_dir_fd(images(directory));
	criu_set_log_level(4);
	criu_set_log_file("log");
	criu_set_notify_cb(notify);
	notified[0] = 0;
	if (pid)
		criu_set_pid(pid);
}

static void ended(pid_t pid)
{
	int status;
	CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status), "the program was not ended");
}

static void end(pid_t pid)
{
	CHECK(pid > 0, "no pid of a restored program: %d", pid);
	kill(pid, SIGKILL);
}

static void questions(void)
{
	options("images", 0);
	CHECK(criu_check() == 0, "criu_check");
	CHECK(criu_get_version() >= 40000, "version %d", criu_get_version());
	CHECK(criu_check_version(31500) == 1, "criu_check_version");
	struct criu_feature_check features = { .mem_track = true, .lazy_pages = true, .pidfd_store = true };
	int answer = criu_feature_check(&features, sizeof(features));
	CHECK(answer == 0, "criu_feature_check: %d", answer);
	CHECK(features.mem_track, "no tracking of memory");
}

static void dump_and_restore(void)
{
	pid_t pid = start();
	counts(0);
	options("images", pid);
	criu_set_leave_running(true);
	CHECK(criu_dump() == 0, "criu_dump of a program that runs on");
	CHECK(strstr(notified, "pre-dump") && strstr(notified, "post-dump"), "told only of: %s", notified);
	int before = count();
	counts(before);
	options("second", pid);
	CHECK(criu_dump() == 0, "criu_dump");
	ended(pid);
	before = count();
	options("second", 0);
	int restored = criu_restore();
	CHECK(restored == pid, "criu_restore: %d", restored);
	CHECK(strstr(notified, "post-restore") && strstr(notified, "pre-resume"), "told only of: %s", notified);
	counts(before);
	end(restored);
}

static void pre_dump(void)
{
	pid_t pid = start();
	counts(0);
	options("one", pid);
	criu_set_track_mem(true);
	CHECK(criu_pre_dump() == 0, "criu_pre_dump");
	counts(count());
	options("two", pid);
	criu_set_track_mem(true);
	criu_set_parent_images("../one");
	CHECK(criu_dump() == 0, "criu_dump");
	ended(pid);
	options("two", 0);
	int restored = criu_restore();
	CHECK(restored == pid, "criu_restore: %d", restored);
	counts(count());
	end(restored);
}

static void restore_child(void)
{
	pid_t pid = start();
	counts(0);
	options("images", pid);
	CHECK(criu_dump() == 0, "criu_dump");
	ended(pid);
	options("images", 0);
	int restored = criu_restore_child();
	CHECK(restored == pid, "criu_restore_child: %d", restored);
	counts(count());
	end(restored);
	ended(restored);
}

static int rounds;

static int more(criu_predump_info info)
{
	char name[32];
	(void)info;
	snprintf(name, sizeof(name), "round%d", rounds);
	criu_set_images_dir_fd(images(name));
	if (rounds) {
		snprintf(name, sizeof(name), "../round%d", rounds - 1);
		criu_set_parent_images(name);
	}
	return rounds++ < 3;
}

static void iterations(void)
{
	pid_t pid = start();
	counts(0);
	options("unused", pid);
	criu_set_track_mem(true);
	int answer = criu_dump_iters(more);
	CHECK(answer == 0, "criu_dump_iters: %d", answer);
	ended(pid);
	CHECK(rounds == 4, "%d rounds", rounds);
	options("round3", 0);
	int restored = criu_restore();
	CHECK(restored == pid, "criu_restore: %d", restored);
	counts(count());
	end(restored);
}

static void refusals(void)
{
	pid_t pid = start();
	counts(0);
	options("images", 4000000);
	CHECK(criu_dump() < 0, "a program that does not exist was saved");
	options("images", 0);
	CHECK(criu_restore() < 0, "nothing was restored");
	options("images", pid);
	criu_set_service_binary("/nonexistent");
	CHECK(criu_dump() < 0, "there is no such criu");
	counts(count());
	end(pid);
}

int main(int argc, char **argv)
{
	CHECK(argc == 4 && !chdir(argv[3]), "usage: libcriu SCENARIO CRIU DIRECTORY");
	binary = argv[2];
	if (!strcmp(argv[1], "questions"))
		questions();
	else if (!strcmp(argv[1], "dump_and_restore"))
		dump_and_restore();
	else if (!strcmp(argv[1], "service"))
		by_socket = true, dump_and_restore();
	else if (!strcmp(argv[1], "pre_dump"))
		pre_dump();
	else if (!strcmp(argv[1], "restore_child"))
		restore_child();
	else if (!strcmp(argv[1], "iterations"))
		iterations();
	else if (!strcmp(argv[1], "refusals"))
		refusals();
	else
		CHECK(false, "no such scenario: %s", argv[1]);
	return 0;
}
