//! Language runtimes: a small program in each, asked over a kept connection.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};

use super::{CONNECTED, Client, Engines, Tree, detached, find, free_port, place};

/// Asks for `COUNT RESULT` lines: the result stays right, the count goes on.
fn converse(
    mut tree: Tree,
    port: u16,
    engines: &Engines<'_>,
    expected: &str,
) -> anyhow::Result<()> {
    let mut client = Client::connect(port, &tree)?;
    let mut last = 0_u64;
    let mut ask = |client: &mut Client, tree: &Tree| -> anyhow::Result<()> {
        let answer = client.ask("next\n").with_context(|| tree.said())?;
        let (count, result) = answer.split_once(' ').context("an answer of two words")?;
        ensure!(result == expected, "the result is {result}, not {expected}");
        let count = count.parse()?;
        ensure!(count > last, "the count went from {last} to {count}");
        last = count;
        Ok(())
    };
    for _ in 0..20 {
        ask(&mut client, &tree)?;
    }
    tree.pass_through(engines, &CONNECTED)?;
    for _ in 0..20 {
        ask(&mut client, &tree)?;
    }
    let mut second = Client::connect(port, &tree)?;
    ask(&mut second, &tree)
}

const PYTHON: &str = r#"
import multiprocessing, socket, sys, threading
def square(n):
    return n * n
def beat(state):
    while True:
        with state["lock"]:
            state["beats"] += 1
        state["event"].wait(0.001)
def serve(connection, pool, state):
    count = 0
    for line in connection.makefile():
        state["count"] += 1
        result = sum(pool.map(square, range(100)))
        connection.sendall(f"{state['count']} {result}\n".encode())
if __name__ == "__main__":
    pool = multiprocessing.Pool(3)
    state = {"lock": threading.Lock(), "event": threading.Event(), "beats": 0, "count": 0}
    for _ in range(8):
        threading.Thread(target=beat, args=(state,), daemon=True).start()
    server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    while True:
        connection, _ = server.accept()
        threading.Thread(target=serve, args=(connection, pool, state), daemon=True).start()
"#;

/// A pool of processes and threads.
pub fn python(engines: &Engines<'_>) -> anyhow::Result<()> {
    let (directory, port) = (place()?, free_port()?);
    let script = directory.path().join("program.py");
    fs::write(&script, PYTHON)?;
    let mut command = detached("python3")?;
    command.arg(&script).arg(port.to_string());
    let tree = Tree::start(command, directory.path())?;
    converse(tree, port, engines, "328350")
}

const NODE: &str = r#"
const net = require('net');
const { Worker } = require('worker_threads');
const worker = new Worker(`
  const { parentPort } = require('worker_threads');
  parentPort.on('message', (n) => {
    let sum = 0;
    for (let i = 0; i < n; i++) sum += i * i;
    parentPort.postMessage(sum);
  });`, { eval: true });
let count = 0, ticks = 0;
setInterval(() => { ticks++; }, 5);
net.createServer((socket) => {
  socket.on('data', () => {
    worker.once('message', (sum) => { socket.write(`${++count} ${sum}\n`); });
    worker.postMessage(100);
  });
}).listen(Number(process.argv[2]), '127.0.0.1');
"#;

/// Timers, a worker thread, the event loop.
pub fn node(engines: &Engines<'_>) -> anyhow::Result<()> {
    let (directory, port) = (place()?, free_port()?);
    let script = directory.path().join("program.js");
    fs::write(&script, NODE)?;
    let mut command = detached("node")?;
    command.arg(&script).arg(port.to_string());
    let tree = Tree::start(command, directory.path())?;
    converse(tree, port, engines, "328350")
}

const JAVA: &str = r#"
import java.io.*;
import java.net.*;
import java.util.concurrent.atomic.*;
public class Loop {
    static long work() {
        long sum = 0;
        for (int i = 0; i < 100; i++) sum += (long) i * i;
        return sum;
    }
    public static void main(String[] args) throws Exception {
        AtomicLong rounds = new AtomicLong();
        for (int t = 0; t < 24; t++) {
            Thread thread = new Thread(() -> {
                while (true) {
                    for (int i = 0; i < 20000; i++) if (work() != 328350) System.exit(3);
                    rounds.incrementAndGet();
                    try { Thread.sleep(1); } catch (InterruptedException e) { return; }
                }
            });
            thread.setDaemon(true);
            thread.start();
        }
        while (rounds.get() < 100) Thread.sleep(5);
        AtomicLong count = new AtomicLong();
        ServerSocket server = new ServerSocket(Integer.parseInt(args[0]), 50, InetAddress.getByName("127.0.0.1"));
        while (true) {
            Socket socket = server.accept();
            Thread thread = new Thread(() -> {
                try {
                    BufferedReader in = new BufferedReader(new InputStreamReader(socket.getInputStream()));
                    while (in.readLine() != null) {
                        long before = rounds.get();
                        while (rounds.get() == before) Thread.sleep(1);
                        String text = count.incrementAndGet() + " " + work() + "\n";
                        socket.getOutputStream().write(text.getBytes());
                    }
                } catch (Exception e) { }
            });
            thread.setDaemon(true);
            thread.start();
        }
    }
}
"#;

/// A loop that the compiler has seen, on many threads.
pub fn java(engines: &Engines<'_>) -> anyhow::Result<()> {
    let (directory, port) = (place()?, free_port()?);
    compile(directory.path())?;
    let mut command = detached("java")?;
    // The performance file changes behind a dump's back.
    command.args(["-XX:-UsePerfData", "-Xmx128m", "-cp"]);
    command
        .arg(directory.path())
        .args(["Loop", &port.to_string()]);
    let tree = Tree::start(command, directory.path())?;
    converse(tree, port, engines, "328350")
}

fn compile(directory: &Path) -> anyhow::Result<()> {
    let source = directory.join("Loop.java");
    fs::write(&source, JAVA)?;
    let output = Command::new(find("javac").context("javac is not installed")?)
        .arg("-d")
        .arg(directory)
        .arg(&source)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "javac: {said}");
    Ok(())
}
