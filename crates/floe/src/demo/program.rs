//! The program that the demo checkpoints: a key-value server and a client under one root.
//!
//! Each value is a page whose content follows from its key and version, so that every answer
//! can be checked by who knows both.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::counters::{Counter, Counters};

/// Pages in a MiB.
pub const PAGES_PER_MIB: u64 = 256;
const WORDS: usize = 512;
const GET: u64 = 0;
const PUT: u64 = 1;

/// Starts a part of the demo: this binary again.
pub fn part(words: &[&str], directory: &Path) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("finding our own binary")?);
    command
        .arg("demo-part")
        .args(words)
        .arg(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    Ok(command)
}

/// The root: starts both in a session of its own and waits for the client.
pub fn root(directory: &Path, mib: u64) -> anyhow::Result<()> {
    rustix::process::setsid().context("making a session")?;
    let mut server = part(&["server", &mib.to_string()], directory)?
        .spawn()
        .context("starting the server")?;
    let mut client = part(&["client", &mib.to_string()], directory)?
        .spawn()
        .context("starting the client")?;
    write_pids(directory, &server, &client)?;
    client.wait().context("waiting for the client")?;
    server.kill().context("stopping the server")?;
    server.wait().context("waiting for the server")?;
    Ok(())
}

/// Server and client, in this order.
const PIDS: &str = "pids";

fn write_pids(directory: &Path, server: &Child, client: &Child) -> anyhow::Result<()> {
    let new = directory.join("pids.new");
    std::fs::write(&new, format!("{} {}", server.id(), client.id())).context("writing the pids")?;
    std::fs::rename(new, directory.join(PIDS)).context("writing the pids")
}

/// The pids of server and client, once there are any.
pub fn read_pids(directory: &Path) -> Option<[u32; 2]> {
    let text = std::fs::read_to_string(directory.join(PIDS)).ok()?;
    let (server, client) = text.split_once(' ')?;
    Some([server.parse().ok()?, client.parse().ok()?])
}

/// Numbers that look like chance but follow from `seed` (splitmix64).
fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn words(key: u64, version: u64) -> impl Iterator<Item = u64> {
    let mut seed = key.rotate_left(32) ^ version;
    (0..WORDS).map(move |_| next(&mut seed))
}

fn checksum(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0, |sum: u64, word| sum.rotate_left(1) ^ word)
}

struct Page {
    version: u64,
    words: Vec<u64>,
}

impl Page {
    fn write(&mut self, key: u64, version: u64) {
        self.version = version;
        self.words.clear();
        self.words.extend(words(key, version));
    }
}

/// Holds `mib` MiB, rewrites them all the time, and answers one client.
pub fn server(directory: &Path, mib: u64) -> anyhow::Result<()> {
    let counters = Counters::open(directory).context("opening the counters")?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening")?;
    let count = mib * PAGES_PER_MIB;
    let mut pages = Vec::with_capacity(usize::try_from(count).context("too many pages")?);
    for key in 0..count {
        let mut page = Page {
            version: 0,
            words: Vec::with_capacity(WORDS),
        };
        page.write(key, 0);
        pages.push(Mutex::new(page));
        if key % PAGES_PER_MIB == 0 {
            counters.set(Counter::Filled, key)?;
        }
    }
    counters.set(Counter::Filled, count)?;
    counters.set(Counter::ServerPort, listener.local_addr()?.port().into())?;
    let pages = Arc::new(pages);
    let rewritten = Arc::clone(&pages);
    std::thread::spawn(move || rewrite(&rewritten));
    let (mut client, _) = listener.accept().context("accepting the client")?;
    client.set_nodelay(true)?;
    loop {
        let mut request = [0; 24];
        if client.read_exact(&mut request).is_err() {
            return Ok(());
        }
        let [operation, key, version] = numbers(&request);
        let slot = usize::try_from(key)
            .ok()
            .and_then(|key| pages.get(key))
            .context("a key out of range")?;
        let mut page = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if operation == PUT {
            page.write(key, version);
        }
        let answer = [page.version, checksum(page.words.iter().copied())];
        drop(page);
        client.write_all(&bytes(answer))?;
    }
}

/// Writes every page again, some at a time: up to 32 MiB in a second.
fn rewrite(pages: &[Mutex<Page>]) {
    const AT_ONCE: usize = 40;
    const PAUSE: Duration = Duration::from_millis(5);
    loop {
        for (number, page) in pages.iter().enumerate() {
            if number % AT_ONCE == 0 {
                std::thread::sleep(PAUSE);
            }
            let mut page = page.lock().unwrap_or_else(PoisonError::into_inner);
            let version = page.version;
            page.write(number as u64, version);
        }
    }
}

fn numbers<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut numbers = [0; N];
    for (number, chunk) in numbers.iter_mut().zip(bytes.chunks_exact(8)) {
        *number = u64::from_le_bytes(chunk.try_into().expect("chunks of eight"));
    }
    numbers
}

fn bytes<const N: usize>(numbers: [u64; N]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect()
}

/// Asks over one connection, which it never makes anew, and checks every answer.
pub fn client(directory: &Path, mib: u64) -> anyhow::Result<()> {
    let counters = Counters::open(directory).context("opening the counters")?;
    let port = loop {
        match counters.get(Counter::ServerPort)? {
            0 => std::thread::sleep(Duration::from_millis(20)),
            port => break u16::try_from(port).context("a port")?,
        }
    };
    let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).context("connecting")?;
    server.set_nodelay(true)?;
    counters.set(Counter::ClientPort, server.local_addr()?.port().into())?;
    let mut versions = vec![0; usize::try_from(mib * PAGES_PER_MIB).context("too many pages")?];
    let (mut seed, mut answers, mut wrong, mut longest) = (1, 0, 0, Duration::ZERO);
    let mut last = Instant::now();
    loop {
        match ask(&mut server, &mut versions, &mut seed) {
            Ok(true) => {}
            Ok(false) => wrong += 1,
            Err(error) => {
                counters.set(Counter::Wrong, wrong + 1)?;
                return Err(error.context("talking to the server"));
            }
        }
        answers += 1;
        longest = longest.max(last.elapsed());
        last = Instant::now();
        if answers % 32 == 0 {
            counters.set(Counter::Answers, answers)?;
            counters.set(Counter::Wrong, wrong)?;
            let phase = counters.get(Counter::Phase)?;
            if phase != counters.get(Counter::PhaseSeen)? {
                longest = Duration::ZERO;
                counters.set(Counter::PhaseSeen, phase)?;
            }
            counters.set(
                Counter::LongestGap,
                longest.as_micros().try_into().unwrap_or(u64::MAX),
            )?;
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// One question; whether the answer is right.
fn ask(server: &mut TcpStream, versions: &mut [u64], seed: &mut u64) -> anyhow::Result<bool> {
    let key = next(seed) % versions.len() as u64;
    let version = &mut versions[usize::try_from(key)?];
    let operation = if next(seed).is_multiple_of(4) {
        PUT
    } else {
        GET
    };
    *version += u64::from(operation == PUT);
    server.write_all(&bytes([operation, key, *version]))?;
    let mut answer = [0; 16];
    server.read_exact(&mut answer)?;
    Ok(numbers(&answer) == [*version, checksum(words(key, *version))])
}
