//! Syscall user dispatch (`prctl(PR_SET_SYSCALL_USER_DISPATCH)`).
//!
//! Saved:    nothing: CRIU's format has no place for it, so a thread that uses it is refused.
//! Rebuilt:  -
//! Not kept: -

use floe_kernel::ids::HostPid;
use floe_kernel::ptrace;

use crate::collect::{CollectError, Obstacle};

/// Refuses a stopped thread that has it on. Kernels that cannot tell (before 6.4) are taken at their word.
pub fn refuse_dispatch(tid: HostPid) -> Result<(), CollectError> {
    match ptrace::syscall_user_dispatch(tid) {
        Ok(dispatch) if dispatch.mode != 0 => Err(CollectError::Unsupported(Obstacle {
            pid: tid,
            object: "syscall user dispatch".to_string(),
            remedy: "emulators that use it (Wine) cannot be saved; end the emulated program"
                .to_string(),
        })),
        _ => Ok(()),
    }
}
