//! Names for numbers, so that a pid is never taken for a descriptor or an address for a size.

use std::fmt;

/// Size of a base page in bytes on the architectures that Floe runs on.
pub const PAGE_SIZE: u64 = 4096;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number! {
    /// A task or thread id in the coordinator's pid namespace.
    HostPid(i32)
}
number! {
    /// A task or thread id in the innermost pid namespace of the task itself.
    NsPid(i32)
}
number! {
    /// A descriptor number in a foreign task.
    TaskFd(i32)
}
number! {
    /// A size in bytes.
    ByteCount(u64)
}
number! {
    /// A number of base pages.
    PageCount(u64)
}

/// An address in a foreign task.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskAddr(pub u64);

impl fmt::Display for TaskAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for TaskAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TaskAddr({:#x})", self.0)
    }
}

impl PageCount {
    /// The same amount in bytes.
    pub fn bytes(self) -> ByteCount {
        ByteCount(self.0 * PAGE_SIZE)
    }
}
