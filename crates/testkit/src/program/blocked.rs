//! Threads that wait in system calls: none of the calls may end because of a dump.

use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};

use super::{Check, Place, Program};
use crate::sys::task;

pub const PROGRAMS: &[Program] = &[
    Program::new("blocked", blocked),
    Program::new("sleeping", sleeping),
    Program::new("busy", busy),
];

/// A thread that waits again and again, and tells when its call ended and how.
struct Waiter {
    name: &'static str,
    ended: Receiver<Result<(), String>>,
    wake: Box<dyn FnMut() -> anyhow::Result<()>>,
}

impl Waiter {
    fn start(
        name: &'static str,
        wait: impl Fn() -> anyhow::Result<()> + Send + 'static,
        wake: impl FnMut() -> anyhow::Result<()> + 'static,
    ) -> Self {
        let (send, ended) = channel();
        std::thread::spawn(move || {
            while send
                .send(wait().map_err(|error| format!("{error:#}")))
                .is_ok()
            {}
        });
        Self {
            name,
            ended,
            wake: Box::new(wake),
        }
    }

    fn check(&mut self) -> anyhow::Result<()> {
        if let Ok(early) = self.ended.try_recv() {
            return Err(anyhow!("{} ended by itself: {early:?}", self.name));
        }
        (self.wake)()?;
        let result = self.ended.recv_timeout(Duration::from_secs(10));
        let result = result.map_err(|_| anyhow!("{} was not woken", self.name))?;
        result.map_err(|error| anyhow!("{}: {error}", self.name))
    }
}

static WORD: AtomicI32 = AtomicI32::new(0);

fn in_files() -> anyhow::Result<Vec<Waiter>> {
    let (out, into) = rustix::pipe::pipe()?;
    let reading = Waiter::start(
        "read",
        move || Ok(File::from(out.try_clone()?).read_exact(&mut [0])?),
        move || Ok(rustix::io::write(&into, b"x").map(drop)?),
    );
    let counter = eventfd(0, EventfdFlags::empty())?;
    let ring = counter.try_clone()?;
    let polling = Waiter::start(
        "poll",
        move || {
            let mut fds = [PollFd::new(&counter, PollFlags::IN)];
            poll(&mut fds, None)?;
            rustix::io::read(&counter, &mut [0; 8])?;
            Ok(())
        },
        move || Ok(rustix::io::write(&ring, &1_u64.to_ne_bytes()).map(drop)?),
    );
    let third = eventfd(0, EventfdFlags::empty())?;
    let ring = third.try_clone()?;
    let old_polling = Waiter::start(
        "poll(2)",
        move || {
            task::poll_readable(&third)?;
            rustix::io::read(&third, &mut [0; 8])?;
            Ok(())
        },
        move || Ok(rustix::io::write(&ring, &1_u64.to_ne_bytes()).map(drop)?),
    );
    let second = eventfd(0, EventfdFlags::empty())?;
    let ring = second.try_clone()?;
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(
        &set,
        &second,
        epoll::EventData::new_u64(1),
        epoll::EventFlags::IN,
    )?;
    let epolling = Waiter::start(
        "epoll_wait",
        move || {
            let mut events = Vec::with_capacity(1);
            let hour = Timespec {
                tv_sec: 3600,
                tv_nsec: 0,
            };
            // Not restarted by the kernel: a stop may end it, and programs know.
            while events.is_empty() {
                match epoll::wait(
                    &set,
                    rustix::buffer::spare_capacity(&mut events),
                    Some(&hour),
                ) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            rustix::io::read(&second, &mut [0; 8])?;
            Ok(())
        },
        move || Ok(rustix::io::write(&ring, &1_u64.to_ne_bytes()).map(drop)?),
    );
    Ok(vec![reading, polling, old_polling, epolling])
}

fn in_sockets() -> anyhow::Result<Vec<Waiter>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let accepting = Waiter::start(
        "accept",
        move || Ok(listener.accept().map(drop)?),
        move || Ok(TcpStream::connect(address).map(drop)?),
    );
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    client.connect(server.local_addr()?)?;
    let receiving = Waiter::start(
        "recvfrom",
        move || Ok(server.recv_from(&mut [0; 8]).map(drop)?),
        move || Ok(client.send(b"x").map(drop)?),
    );
    Ok(vec![accepting, receiving])
}

fn blocked(_: &Place) -> anyhow::Result<Check> {
    // Before the threads: it forks.
    let (hold, release) = rustix::pipe::pipe()?;
    let child = task::fork(0, || {
        rustix::io::read(hold.as_fd(), &mut [0_u8; 1]).map_or(1, |_| 0)
    })?;
    let mut waiters = in_files()?;
    waiters.extend(in_sockets()?);
    waiters.push(Waiter::start(
        "futex",
        || {
            while WORD.load(Ordering::SeqCst) == 0 {
                match task::futex_wait(&WORD, 0) {
                    Ok(()) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
            }
            WORD.store(0, Ordering::SeqCst);
            Ok(())
        },
        || {
            task::futex_wake(&WORD, 1);
            Ok(())
        },
    ));
    let (send, ended) = channel();
    std::thread::spawn(move || send.send(task::wait_id(child, libc::WEXITED)));
    let mut first = Some((release, ended));
    Ok(Box::new(move || {
        waiters.iter_mut().try_for_each(Waiter::check)?;
        if let Some((release, ended)) = first.take() {
            ensure!(ended.try_recv().is_err(), "wait4 ended by itself");
            rustix::io::write(&release, b"x")?;
            let result = ended.recv_timeout(Duration::from_secs(10))??;
            ensure!(
                result == Some((libc::CLD_EXITED, 0)),
                "wait4 gave {result:?}"
            );
        }
        Ok(())
    }))
}

/// Sleeps go on for the rest of their time.
fn sleeping(_: &Place) -> anyhow::Result<Check> {
    let (send, ended) = channel();
    let long = send.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(3600));
        let _ = long.send("the sleep of an hour ended");
    });
    let (beat, beats) = channel();
    std::thread::spawn(move || {
        loop {
            let started = Instant::now();
            std::thread::sleep(Duration::from_millis(30));
            if started.elapsed() < Duration::from_millis(30) {
                let _ = send.send("a short sleep ended early");
            }
            if beat.send(()).is_err() {
                return;
            }
        }
    });
    Ok(Box::new(move || {
        if let Ok(what) = ended.try_recv() {
            return Err(anyhow!(what));
        }
        while beats.try_recv().is_ok() {}
        beats
            .recv_timeout(Duration::from_secs(10))
            .map_err(|_| anyhow!("the short sleeps stand still"))
    }))
}

/// A thread that computes all the time, with its numbers in vector registers.
fn busy(_: &Place) -> anyhow::Result<Check> {
    let (send, results) = std::sync::mpsc::sync_channel::<f64>(0);
    std::thread::spawn(move || {
        loop {
            let mut sums = [0.0_f64; 8];
            for step in 0..400_000_u32 {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    *sum += f64::from(step) * (lane as f64 + 0.5);
                }
            }
            if send.send(std::hint::black_box(sums).iter().sum()).is_err() {
                return;
            }
        }
    });
    let expected = results.recv()?;
    Ok(Box::new(move || {
        for _ in 0..3 {
            let found = results.recv_timeout(Duration::from_secs(20))?;
            ensure!(found == expected, "the sum is {found}, not {expected}");
        }
        Ok(())
    }))
}
