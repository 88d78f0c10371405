//! Asking the kernel about many things while another thread works on the answers.

use std::sync::mpsc::{SyncSender, sync_channel};

use floe_kernel::namespace::unshare;

use super::CollectError;

/// So many questions take longer than to start a thread.
const WORTH_A_THREAD: usize = 64;
/// Answers that are handed over at a time, and how many such batches may wait: each answer may hold a
/// descriptor of ours open.
const BATCH: usize = 32;
const BATCHES: usize = 2;

/// Calls `ask` for each of `about`, on another thread where there are many, and `take` with the index and
/// the answer, in order, on this one. The first failure of `take` ends it.
pub fn ask_ahead<Q: Copy + Sync, A: Send, E: Into<CollectError> + Send>(
    about: &[Q],
    ask: impl Fn(Q) -> Result<A, E> + Send,
    mut take: impl FnMut(usize, Result<A, CollectError>) -> Result<(), CollectError>,
) -> Result<(), CollectError> {
    if about.len() < WORTH_A_THREAD {
        let mut each = about.iter().enumerate();
        return each.try_for_each(|(index, one)| take(index, ask(*one).map_err(Into::into)));
    }
    let failed = |action: &str| {
        let action = action.to_string();
        move |source| CollectError::System { action, source }
    };
    std::thread::scope(|scope| {
        let (sender, batches) = sync_channel(BATCHES);
        let thread = std::thread::Builder::new().name("floe-ask".into());
        thread
            .spawn_scoped(scope, move || {
                // The other thread visits mount namespaces, which it can only if it shares no directory.
                let alone = unshare(libc::CLONE_FS.cast_unsigned());
                // It takes nothing before this is done.
                if sender.send((alone, Vec::new())).is_ok() {
                    send_answers(about, ask, &sender);
                }
            })
            .map_err(failed("Starting a thread"))?;
        let mut index = 0;
        for (alone, batch) in batches {
            alone.map_err(failed("Leaving the shared working directory"))?;
            for answer in batch {
                take(index, answer)?;
                index += 1;
            }
        }
        Ok(())
    })
}

type Batch<A> = (std::io::Result<()>, Vec<Result<A, CollectError>>);

fn send_answers<Q: Copy, A, E: Into<CollectError>>(
    about: &[Q],
    ask: impl Fn(Q) -> Result<A, E>,
    sender: &SyncSender<Batch<A>>,
) {
    for chunk in about.chunks(BATCH) {
        let batch = chunk
            .iter()
            .map(|one| ask(*one).map_err(Into::into))
            .collect();
        // Nobody listens any more after a failure.
        if sender.send((Ok(()), batch)).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_order_and_a_failure_ends_it() {
        for count in [10, 1000] {
            let about: Vec<usize> = (0..count).collect();
            let twice = |one: usize| Ok::<_, CollectError>(2 * one);
            let mut seen = 0;
            let all = ask_ahead(&about, twice, |index, answer| {
                assert_eq!((index, answer?), (seen, 2 * seen));
                seen += 1;
                Ok(())
            });
            assert!(all.is_ok() && seen == count);
            let stopped = ask_ahead(&about, twice, |index, _| match index {
                5 => Err(CollectError::System {
                    action: "Testing".to_string(),
                    source: std::io::ErrorKind::Other.into(),
                }),
                _ => Ok(()),
            });
            assert!(stopped.is_err());
        }
    }
}
