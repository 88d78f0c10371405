//! Handing descriptors to tasks that cannot see the coordinator: from another pid namespace, or without
//! rights over it.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use floe_inject::{Arg, Program};
use floe_kernel::inherited;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};

use super::{Attempt, ExecuteError, World};

/// A pair of sockets, of which every task inherits one end.
#[derive(Debug)]
pub struct Courier {
    ours: OwnedFd,
    theirs: OwnedFd,
}

/// Bytes of `struct msghdr`, and where in it the buffers are named.
const MSGHDR: usize = 56;
const IOV: usize = 16;
const IOV_COUNT: usize = 24;
const CONTROL: usize = 32;
const CONTROL_LENGTH: usize = 40;
/// Room for one descriptor in a control message, and where it is.
const RIGHTS: usize = 24;
const RIGHTS_FD: u64 = 16;

impl Courier {
    /// Makes the pair, before the first task exists.
    pub fn new(world: &World<'_>) -> Result<Self, ExecuteError> {
        let pair = socketpair(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        );
        let (ours, theirs) = pair.during("Making", || "a pair of sockets".to_string())?;
        Ok(Courier {
            ours: world.lift(ours)?,
            theirs: world.lift(theirs)?,
        })
    }

    /// Where every task has its end.
    pub fn number_in_task(&self) -> RawFd {
        self.theirs.as_raw_fd()
    }

    /// Sends a descriptor of ours and has the task take it; returns its number there.
    pub fn hand_over(
        &self,
        world: &mut World<'_>,
        pid: u32,
        file: RawFd,
    ) -> Result<RawFd, ExecuteError> {
        let copy =
            inherited::duplicate(file).during("Duplicating", || format!("descriptor {file}"))?;
        self.send(copy.as_fd())?;
        let mut program = Program::new();
        let byte = program.zeroed(16);
        let iov = program.buffer(&[[0u8; 8], 1u64.to_le_bytes()].concat());
        program.point(iov, 0, byte);
        let rights = program.zeroed(RIGHTS);
        let mut header = [0u8; MSGHDR];
        header[IOV_COUNT] = 1;
        header[CONTROL_LENGTH] = RIGHTS as u8;
        let header = program.buffer(&header);
        program.point(header, IOV, iov);
        program.point(header, CONTROL, rights);
        let args = [
            Arg::from(self.number_in_task()),
            Arg::from(header),
            Arg::from(0),
        ];
        program.call("recvmsg of a descriptor", libc::SYS_recvmsg, &args);
        // Above everything that the task will have: its descriptors are not in place yet.
        let received = Arg::Load(rights, RIGHTS_FD);
        let lowest = Arg::from(world.first_fd());
        let args = [received, Arg::from(libc::F_DUPFD), lowest];
        let high = program.call("fcntl(F_DUPFD)", libc::SYS_fcntl, &args);
        program.call("close", libc::SYS_close, &[received]);
        let outcome = world.run(pid, &program)?.expect("the program has calls");
        Ok(outcome.result(high) as RawFd)
    }

    fn send(&self, file: BorrowedFd<'_>) -> Result<(), ExecuteError> {
        let files = [file];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(
            control.push(SendAncillaryMessage::ScmRights(&files)),
            "there is room for one"
        );
        let sent = sendmsg(
            &self.ours,
            &[IoSlice::new(&[0])],
            &mut control,
            SendFlags::empty(),
        );
        sent.map(drop)
            .during("Sending", || format!("descriptor {}", file.as_raw_fd()))
    }
}
