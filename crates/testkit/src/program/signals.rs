//! Signals: actions, masks, stacks, queues.

use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use anyhow::ensure;

use super::{Check, Place, Program, fact, unchanged};
use crate::sys::signal;

pub const PROGRAMS: &[Program] = &[
    Program::new("signal-actions", actions),
    Program::new("signals-pending", pending),
    Program::new("signals-pending-threads", pending_in_threads),
];

static CAUGHT: AtomicI32 = AtomicI32::new(0);

extern "C" fn catch(_: i32) {
    CAUGHT.fetch_add(1, Ordering::SeqCst);
}

fn actions(_: &Place) -> anyhow::Result<Check> {
    signal::handle(
        libc::SIGUSR2,
        catch,
        libc::SA_RESTART,
        &[libc::SIGHUP, libc::SIGTERM],
    );
    signal::handle(
        libc::SIGRTMIN() + 3,
        catch,
        libc::SA_NODEFER | libc::SA_ONSTACK,
        &[],
    );
    signal::ignore(libc::SIGHUP);
    signal::block(&[libc::SIGWINCH, libc::SIGRTMIN() + 9]);
    signal::set_alternate_stack(64 << 10);
    let mut same = unchanged(|| {
        let mut facts: Vec<_> = (1..=64)
            .map(|number| {
                fact(
                    format!("action {number}"),
                    format!("{:x?}", signal::action(number)),
                )
            })
            .collect();
        facts.push(fact("mask", format!("{:x}", signal::blocked())));
        facts.push(fact(
            "alternate stack",
            format!("{:x?}", signal::alternate_stack()),
        ));
        Ok(facts)
    })?;
    Ok(Box::new(move || {
        same()?;
        let before = CAUGHT.load(Ordering::SeqCst);
        signal::raise_in_thread(libc::SIGUSR2);
        signal::raise_in_thread(libc::SIGRTMIN() + 3);
        let caught = CAUGHT.load(Ordering::SeqCst) - before;
        ensure!(caught == 2, "{caught} of 2 handlers ran");
        Ok(())
    }))
}

/// Takes everything from the queues, compares, and puts it back.
fn drain(signals: &[i32]) -> Vec<signal::Taken> {
    let mut taken = Vec::new();
    while let Ok(signal) = signal::take(signals, Some(Duration::ZERO)) {
        taken.push(signal);
    }
    taken
}

/// Signals that wait: ordinary ones once, real-time ones in order with their values.
fn pending(_: &Place) -> anyhow::Result<Check> {
    let (first, second) = (libc::SIGRTMIN() + 1, libc::SIGRTMIN() + 2);
    let signals = [libc::SIGUSR2, libc::SIGHUP, first, second];
    signal::block(&signals);
    let own = std::process::id() as i32;
    let send = move || {
        signal::queue(own, libc::SIGUSR2, 1)?;
        signal::queue(own, first, 10)?;
        signal::queue(own, first, 11)?;
        signal::queue(own, second, 12)?;
        signal::queue(own, first, 13)?;
        signal::raise_in_thread(libc::SIGHUP);
        anyhow::Ok(())
    };
    send()?;
    let expected = drain(&signals);
    ensure!(expected.len() == 6, "{} of 6 signals wait", expected.len());
    send()?;
    let bits = signal::pending();
    Ok(Box::new(move || {
        let now = signal::pending();
        ensure!(now == bits, "pending {now:x} instead of {bits:x}");
        let taken = drain(&signals);
        ensure!(
            taken == expected,
            "signals {taken:?} instead of {expected:?}"
        );
        send()
    }))
}

/// Each thread has a queue of its own.
fn pending_in_threads(_: &Place) -> anyhow::Result<Check> {
    let number = libc::SIGRTMIN() + 5;
    signal::block(&[number, libc::SIGUSR2]);
    let (ask, questions) = std::sync::mpsc::channel::<()>();
    let (answer, answers) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        signal::raise_in_thread(number);
        signal::raise_in_thread(number);
        for () in questions {
            let taken = drain(&[number, libc::SIGUSR2]);
            let numbers: Vec<i32> = taken.iter().map(|taken| taken.signal).collect();
            signal::raise_in_thread(number);
            signal::raise_in_thread(number);
            let _ = answer.send(numbers);
        }
    });
    let mut check: Check = Box::new(move || {
        ensure!(
            drain(&[number]).is_empty(),
            "the main thread has the other's signals"
        );
        ask.send(())?;
        let numbers = answers.recv()?;
        ensure!(numbers == [number, number], "the thread had {numbers:?}");
        Ok(())
    });
    check()?;
    Ok(check)
}
