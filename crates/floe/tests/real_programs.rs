//! Programs that people run, dumped and restored by this binary (or by `FLOE_BIN`), and judged by
//! their own clients.

use testkit::{Engine, real, skips};

fn cycle(name: &str) {
    if !rustix::process::geteuid().is_root() {
        skips::skip(name, "needs root").expect("the skip is listed");
        return;
    }
    let engine = match std::env::var_os("FLOE_BIN") {
        Some(path) => Engine::new("floe", path),
        None => Engine::new("floe", env!("CARGO_BIN_EXE_floe")),
    };
    let program = real::PROGRAMS.iter().find(|program| program.name == name);
    let program = program.expect("the program is in the table");
    let result = skips::or_skip(name, program.cycle(&engine, &engine));
    result.unwrap_or_else(|error| panic!("{name}: {error:#}"));
}

#[test]
fn redis_keeps_its_keys_and_its_client() {
    cycle("redis");
}

#[test]
fn memcached_keeps_its_values_and_its_client() {
    cycle("memcached");
}

#[test]
fn nginx_keeps_its_workers_and_a_kept_alive_connection() {
    cycle("nginx");
}

#[test]
fn postgresql_keeps_its_backends_and_an_open_transaction() {
    cycle("postgresql");
}

#[test]
fn python_keeps_its_processes_and_threads() {
    cycle("python3");
}

#[test]
fn node_keeps_its_timers_and_worker() {
    cycle("node");
}

#[test]
fn java_keeps_its_compiled_loop_and_threads() {
    cycle("java");
}

#[test]
fn a_pipeline_loses_nothing() {
    cycle("pipeline");
}

#[test]
fn tmux_keeps_its_shell_on_a_terminal() {
    cycle("tmux");
}
