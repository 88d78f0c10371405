//! Both sides of a page server talk over a pair of sockets; and what a hostile sender can do.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use floe_image::dir::PE_PRESENT;
use floe_image::{ImageDir, ImageKind, ImageWriter, Sync};
use floe_kernel::ids::PAGE_SIZE;
use floe_memory::{PageIndex, PageRun, PageSource};
use floe_transfer::frame::{Command, Frame, Target};
use floe_transfer::{
    Connection, PageSender, PagemapJob, ReceiveError, Received, SendError, receive,
};

/// Each page is filled with its number.
#[derive(Debug)]
struct Numbered;

impl PageSource for Numbered {
    fn read(&self, runs: &[PageRun], buffer: &mut [u8]) -> std::io::Result<()> {
        let pages = runs
            .iter()
            .flat_map(|run| (0..run.pages).map(|i| run.start / PAGE_SIZE + i));
        for (chunk, page) in buffer.chunks_mut(PAGE_SIZE as usize).zip(pages) {
            chunk.fill(page as u8);
        }
        Ok(())
    }
}

fn run(first: u64, pages: u64) -> PageRun {
    PageRun {
        start: first * PAGE_SIZE,
        pages,
    }
}

fn server(dir: &Path, parent: Option<&str>) -> (UnixStream, Serving) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let writer = ImageWriter::create(dir, Sync::None).expect("a directory");
    if let Some(parent) = parent {
        writer.link_parent(Path::new(parent)).expect("a link");
    }
    let serving = std::thread::spawn(move || {
        let mut connection = Connection::new(OwnedFd::from(theirs)).expect("a socket");
        receive(&mut connection, &writer)
    });
    (ours, serving)
}

type Serving = std::thread::JoinHandle<Result<Received, ReceiveError>>;

fn send(socket: UnixStream, job: PagemapJob) -> Result<(), SendError> {
    let connection = Connection::new(OwnedFd::from(socket)).expect("a socket");
    let mut sender = PageSender::lent(connection)?;
    sender.send(job);
    sender.finish().map(drop)
}

fn job(runs: Vec<PageRun>, in_parent: Vec<PageRun>) -> PagemapJob {
    PagemapJob {
        target: Target::Task(5),
        runs: vec![(Arc::new(Numbered), runs)],
        in_parent,
    }
}

#[test]
fn pages_and_holes_arrive_in_order() {
    let place = tempfile::tempdir().expect("a directory");
    let (socket, serving) = server(&place.path().join("1"), None);
    send(socket, job(vec![run(10, 200), run(300, 1)], Vec::new())).expect("sent");
    let received = serving.join().expect("no panic").expect("received");
    assert_eq!((received.objects, received.pages), (1, 201));
    let (socket, serving) = server(&place.path().join("2"), Some("../1"));
    let holes = vec![run(10, 5), run(300, 1)];
    send(socket, job(vec![run(15, 2)], holes)).expect("sent");
    let received = serving.join().expect("no panic").expect("received");
    assert_eq!((received.pages, received.in_parent), (2, 6));
    let images = ImageDir::open(place.path().join("2")).expect("a directory");
    let index = PageIndex::read(&images, ImageKind::Pagemap, 5).expect("a good chain");
    let shape: Vec<_> = index
        .runs()
        .iter()
        .map(|run| (run.start / PAGE_SIZE, run.len / PAGE_SIZE, run.file))
        .collect();
    assert_eq!(shape, [(10, 5, 0), (15, 2, 1), (300, 1, 0)]);
    let mut page = [0; PAGE_SIZE as usize];
    let file = index.open(0).expect("opened");
    file.read_exact_at(&mut page, 200 * PAGE_SIZE)
        .expect("read");
    assert!(page.iter().all(|&byte| byte == 300u64 as u8));
}

#[test]
fn a_hole_that_no_parent_has_fails_on_both_sides() {
    let place = tempfile::tempdir().expect("a directory");
    let (socket, serving) = server(place.path(), None);
    let sent = send(socket, job(Vec::new(), vec![run(1, 1)]));
    assert!(matches!(sent, Err(SendError::Connection(_))), "{sent:?}");
    let received = serving.join().expect("no panic");
    assert!(matches!(received, Err(ReceiveError::NotInParent { .. })));
}

#[test]
fn a_dump_that_fails_is_not_taken_for_whole() {
    let place = tempfile::tempdir().expect("a directory");
    let (socket, serving) = server(place.path(), None);
    let connection = Connection::new(OwnedFd::from(socket)).expect("a socket");
    let mut sender = PageSender::connected(connection).expect("a thread");
    sender.send(job(vec![run(1, 1)], Vec::new()));
    drop(sender);
    let received = serving.join().expect("no panic");
    assert!(matches!(received, Err(ReceiveError::NotClosed)));
}

/// What the server says to these frames.
fn hostile(frames: &[Vec<u8>]) -> ReceiveError {
    let place = tempfile::tempdir().expect("a directory");
    let (mut socket, serving) = server(place.path(), None);
    for frame in frames {
        // It may have hung up already.
        let _ = socket.write_all(frame);
    }
    drop(socket);
    serving
        .join()
        .expect("no panic")
        .expect_err("nothing good was sent")
}

#[test]
fn hostile_frames_are_refused() {
    let add = |start, pages| Frame {
        command: Command::Add { flags: PE_PRESENT },
        run: PageRun { start, pages },
        object: Target::Task(1).encode(),
    };
    let open = Frame::about(Command::Open, Target::Task(1))
        .encode()
        .to_vec();
    let page = vec![0; PAGE_SIZE as usize];
    let huge = add(0, u64::MAX / PAGE_SIZE).encode().to_vec();
    let mut unknown = Frame::bare(Command::Close).encode();
    unknown[0] = 99;
    let cases: [(&[Vec<u8>], &str); 6] = [
        (&[open.clone(), huge], "Receiving pages"),
        (
            &[
                open.clone(),
                add(8192, 1).encode().to_vec(),
                page.clone(),
                add(4096, 1).encode().to_vec(),
            ],
            "out of order",
        ),
        (&[add(4097, 1).encode().to_vec()], "not the protocol"),
        (&[add(0, u64::MAX).encode().to_vec()], "not the protocol"),
        (&[unknown.to_vec()], "not the protocol"),
        (&[vec![1; 20]], "Receiving pages"),
    ];
    for (frames, expected) in cases {
        let error = hostile(frames);
        assert!(error.to_string().contains(expected), "{error:?}");
    }
    // Random bytes: any error will do, a panic will not.
    let mut seed = 88172645463325252u64;
    for _ in 0..200 {
        let mut noise = Vec::new();
        for _ in 0..20 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let mut frame = add(seed & 0xf000, seed >> 40 & 3).encode();
            frame[(seed >> 20) as usize % 32] = (seed >> 32) as u8 & 7;
            noise.extend_from_slice(&frame);
        }
        hostile(&[noise]);
    }
}
