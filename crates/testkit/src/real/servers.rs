//! Servers with a client that is connected all the time.

use std::fs;

use anyhow::{Context, ensure};

use super::{CONNECTED, Client, Engines, Tree, detached, free_port, place};

/// 256 MiB of keys.
pub fn redis(engines: &Engines<'_>) -> anyhow::Result<()> {
    const KEYS: usize = 65_536;
    let (directory, port) = (place()?, free_port()?);
    let mut command = detached("redis-server")?;
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1"]);
    command.args(["--save", "", "--enable-debug-command", "yes", "--dir"]);
    command.arg(directory.path());
    let mut tree = Tree::start(command, directory.path())?;
    let mut client = Client::connect(port, &tree)?;
    let filled = client.ask(&format!("DEBUG POPULATE {KEYS} key 4096\r\n"))?;
    ensure!(filled == "+OK", "filling: {filled}");
    ensure!(client.ask("SET before dump\r\n")? == "+OK", "SET failed");
    ensure!(client.ask("INCR counter\r\n")? == ":1", "INCR failed");
    let value = get(&mut client, "key:12345")?;
    tree.pass_through(engines, &CONNECTED)?;
    let count = client.ask("DBSIZE\r\n")?;
    ensure!(count == format!(":{}", KEYS + 2), "DBSIZE {count}");
    ensure!(
        client.ask("INCR counter\r\n")? == ":2",
        "the counter is another"
    );
    ensure!(get(&mut client, "before")? == b"dump", "the key is another");
    ensure!(
        get(&mut client, "key:12345")? == value,
        "a value is another"
    );
    let mut second = Client::connect(port, &tree)?;
    ensure!(
        second.ask("INCR counter\r\n")? == ":3",
        "a new client is not served"
    );
    Ok(())
}

fn get(client: &mut Client, key: &str) -> anyhow::Result<Vec<u8>> {
    let head = client.ask(&format!("GET {key}\r\n"))?;
    let length = head.strip_prefix('$').and_then(|text| text.parse().ok());
    let value = client.bytes(length.with_context(|| format!("GET answered {head}"))?)?;
    client.bytes(2)?;
    Ok(value)
}

pub fn memcached(engines: &Engines<'_>) -> anyhow::Result<()> {
    let (directory, port) = (place()?, free_port()?);
    let mut command = detached("memcached")?;
    command.args(["-u", "nobody", "-l", "127.0.0.1", "-p", &port.to_string()]);
    let mut tree = Tree::start(command, directory.path())?;
    let mut client = Client::connect(port, &tree)?;
    for key in 0..1000 {
        let stored = client.ask(&format!("set key{key} 0 0 6\r\n{:06}\r\n", key * 7))?;
        ensure!(stored == "STORED", "set: {stored}");
    }
    tree.pass_through(engines, &CONNECTED)?;
    for key in 0..1000 {
        let head = client.ask(&format!("get key{key}\r\n"))?;
        ensure!(head == format!("VALUE key{key} 0 6"), "get: {head}");
        let value = client.line()?;
        ensure!(value == format!("{:06}", key * 7), "key {key} is {value}");
        client.line()?;
    }
    let mut second = Client::connect(port, &tree)?;
    ensure!(
        second.ask("get key1\r\n")? == "VALUE key1 0 6",
        "a new client is not served"
    );
    Ok(())
}

/// A master and two workers; the client keeps its connection alive.
pub fn nginx(engines: &Engines<'_>) -> anyhow::Result<()> {
    let (directory, port) = (place()?, free_port()?);
    let home = directory.path();
    let text = home.display();
    let configuration = format!(
        "daemon off; pid {text}/pid; error_log {text}/error.log; worker_processes 2;\n\
         events {{ worker_connections 64; }}\n\
         http {{ access_log off; keepalive_timeout 600; client_body_temp_path {text}/body;\n\
         proxy_temp_path {text}/proxy; fastcgi_temp_path {text}/fastcgi; uwsgi_temp_path {text}/uwsgi;\n\
         scgi_temp_path {text}/scgi;\n\
         server {{ listen 127.0.0.1:{port}; root {text}/www; }} }}\n"
    );
    fs::create_dir(home.join("www"))?;
    fs::write(home.join("www/page"), "served as before\n")?;
    fs::write(home.join("nginx.conf"), configuration)?;
    let mut command = detached("nginx")?;
    command.arg("-c").arg(home.join("nginx.conf"));
    command.arg("-e").arg(home.join("error.log"));
    let mut tree = Tree::start(command, home)?;
    let mut client = Client::connect(port, &tree)?;
    let before = page(&mut client)?;
    ensure!(before == "served as before\n", "the page is {before:?}");
    tree.pass_through(engines, &CONNECTED)?;
    ensure!(
        page(&mut client)? == before,
        "the kept connection serves another page"
    );
    for _ in 0..8 {
        let mut another = Client::connect(port, &tree)?;
        ensure!(
            page(&mut another)? == before,
            "a new connection serves another page"
        );
    }
    Ok(())
}

fn page(client: &mut Client) -> anyhow::Result<String> {
    let status = client.ask("GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    ensure!(status == "HTTP/1.1 200 OK", "status {status}");
    let mut length = 0;
    loop {
        let line = client.line()?;
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("Content-Length: ") {
            length = value.parse()?;
        }
    }
    Ok(String::from_utf8(client.bytes(length)?)?)
}
