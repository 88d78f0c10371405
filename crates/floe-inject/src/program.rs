//! Programs for the executor: system calls in a row, as data.

use std::borrow::Cow;

/// Size of an entry in the arena, in bytes: number, six arguments, indirection mask, check, result.
pub const ENTRY_SIZE: usize = 80;
/// Offset of the mask whose bit i says that argument i is the address of the value.
pub const INDIRECT_OFFSET: usize = 56;
/// Offset of the word that is non-zero when an error ends the program.
pub const CHECK_OFFSET: usize = 64;
/// Offset of the result.
pub const RESULT_OFFSET: usize = 72;

/// A call of one [`Program`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallId(usize);

/// A buffer of one [`Program`], which lies in the arena while the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferId(usize);

/// An argument of a call.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// The value itself.
    Value(u64),
    /// The result of an earlier call of the same program.
    Result(CallId),
    /// The address of a buffer.
    Buffer(BufferId),
    /// The address of this byte in a buffer.
    At(BufferId, u64),
    /// The eight bytes at this offset in a buffer, read when the call is made.
    Load(BufferId, u64),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Arg::Value(value)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Arg::Value(u64::from(value))
    }
}

impl From<usize> for Arg {
    fn from(value: usize) -> Self {
        Arg::Value(value as u64)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Arg::Value(i64::from(value) as u64)
    }
}

impl From<i64> for Arg {
    fn from(value: i64) -> Self {
        Arg::Value(value as u64)
    }
}

impl From<CallId> for Arg {
    fn from(call: CallId) -> Self {
        Arg::Result(call)
    }
}

impl From<BufferId> for Arg {
    fn from(buffer: BufferId) -> Self {
        Arg::Buffer(buffer)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) label: Cow<'static, str>,
    pub(crate) number: i64,
    args: [Arg; 6],
    pub(crate) must_succeed: bool,
}

/// System calls in a row, with the buffers that they use.
#[derive(Clone, Debug, Default)]
pub struct Program {
    pub(crate) calls: Vec<Call>,
    data: Vec<u8>,
    buffers: Vec<(usize, usize)>,
    pointers: Vec<Pointer>,
}

/// A place in a buffer that holds the address of another buffer.
#[derive(Clone, Copy, Debug)]
struct Pointer {
    at: usize,
    to: BufferId,
}

impl Program {
    /// A program without calls.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a call whose failure ends the program; `label` names call and object in the error.
    pub fn call(
        &mut self,
        label: impl Into<Cow<'static, str>>,
        number: i64,
        args: &[Arg],
    ) -> CallId {
        self.push(label.into(), number, args, true)
    }

    /// Adds a call that may fail; its result tells.
    pub fn try_call(
        &mut self,
        label: impl Into<Cow<'static, str>>,
        number: i64,
        args: &[Arg],
    ) -> CallId {
        self.push(label.into(), number, args, false)
    }

    fn push(
        &mut self,
        label: Cow<'static, str>,
        number: i64,
        args: &[Arg],
        must_succeed: bool,
    ) -> CallId {
        let mut all = [Arg::Value(0); 6];
        all[..args.len()].copy_from_slice(args);
        self.calls.push(Call {
            label,
            number,
            args: all,
            must_succeed,
        });
        CallId(self.calls.len() - 1)
    }

    /// A buffer with these bytes.
    pub fn buffer(&mut self, bytes: &[u8]) -> BufferId {
        let start = self.data.len();
        self.data.extend_from_slice(bytes);
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        self.buffers.push((start, bytes.len()));
        BufferId(self.buffers.len() - 1)
    }

    /// A buffer of zeros, for a call to fill.
    pub fn zeroed(&mut self, len: usize) -> BufferId {
        self.buffer(&vec![0; len])
    }

    /// Puts the address of buffer `to` into the eight bytes at `offset` of buffer `at`.
    pub fn point(&mut self, at: BufferId, offset: usize, to: BufferId) {
        let (start, len) = self.buffers[at.0];
        assert!(offset + 8 <= len, "the pointer lies inside its buffer");
        self.pointers.push(Pointer {
            at: start + offset,
            to,
        });
    }

    /// Adds the calls of another program behind its own. What the other's ids stand for is found in the
    /// outcome by [`Outcome::behind`].
    pub fn append(&mut self, other: &Program) {
        let (calls, buffers, bytes) = (self.calls.len(), self.buffers.len(), self.data.len());
        let moved = |buffer: BufferId| BufferId(buffer.0 + buffers);
        self.calls
            .extend(other.calls.iter().cloned().map(|mut call| {
                for arg in &mut call.args {
                    *arg = match *arg {
                        Arg::Value(value) => Arg::Value(value),
                        Arg::Result(earlier) => Arg::Result(CallId(earlier.0 + calls)),
                        Arg::Buffer(buffer) => Arg::Buffer(moved(buffer)),
                        Arg::At(buffer, offset) => Arg::At(moved(buffer), offset),
                        Arg::Load(buffer, offset) => Arg::Load(moved(buffer), offset),
                    };
                }
                call
            }));
        self.data.extend_from_slice(&other.data);
        let places = other.buffers.iter();
        self.buffers
            .extend(places.map(|&(start, len)| (start + bytes, len)));
        let pointers = other.pointers.iter();
        self.pointers.extend(pointers.map(|pointer| Pointer {
            at: pointer.at + bytes,
            to: moved(pointer.to),
        }));
    }

    /// Whether it has no calls.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Number of calls.
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    /// Bytes that it takes in an arena.
    pub fn arena_bytes(&self) -> usize {
        self.calls.len() * ENTRY_SIZE + self.data.len()
    }

    /// The arguments of a call of a program at `base`, where calls are made from outside: `results` are those
    /// of the calls before it.
    pub(crate) fn direct_args(&self, call: &Call, base: u64, results: &[i64]) -> [u64; 6] {
        let data = base + (self.calls.len() * ENTRY_SIZE) as u64;
        let address = |buffer: BufferId| data + self.buffers[buffer.0].0 as u64;
        call.args.map(|arg| match arg {
            Arg::Value(value) => value,
            Arg::Result(earlier) => results[earlier.0].cast_unsigned(),
            Arg::Buffer(buffer) => address(buffer),
            Arg::At(buffer, offset) => address(buffer) + offset,
            Arg::Load(..) => unreachable!("only the executor loads words"),
        })
    }

    /// The bytes to be put at `base` in the task: entries, then buffers.
    pub(crate) fn assemble(&self, base: u64) -> Vec<u8> {
        let data_base = base + (self.calls.len() * ENTRY_SIZE) as u64;
        let mut image = Vec::with_capacity(self.arena_bytes());
        for call in &self.calls {
            image.extend_from_slice(&call.number.to_le_bytes());
            let mut indirect = 0u64;
            for (index, arg) in call.args.iter().enumerate() {
                let value = match *arg {
                    Arg::Value(value) => value,
                    Arg::Buffer(buffer) => data_base + self.buffers[buffer.0].0 as u64,
                    Arg::At(buffer, offset) => data_base + self.buffers[buffer.0].0 as u64 + offset,
                    Arg::Load(buffer, offset) => {
                        indirect |= 1 << index;
                        data_base + self.buffers[buffer.0].0 as u64 + offset
                    }
                    Arg::Result(earlier) => {
                        indirect |= 1 << index;
                        base + (earlier.0 * ENTRY_SIZE + RESULT_OFFSET) as u64
                    }
                };
                image.extend_from_slice(&value.to_le_bytes());
            }
            image.extend_from_slice(&indirect.to_le_bytes());
            image.extend_from_slice(&u64::from(call.must_succeed).to_le_bytes());
            image.extend_from_slice(&0u64.to_le_bytes());
        }
        image.extend_from_slice(&self.data);
        let entries = self.calls.len() * ENTRY_SIZE;
        for pointer in &self.pointers {
            let address = data_base + self.buffers[pointer.to.0].0 as u64;
            image[entries + pointer.at..][..8].copy_from_slice(&address.to_le_bytes());
        }
        image
    }

    /// Reads results and buffers out of what the arena holds after the run.
    pub(crate) fn outcome(&self, image: Vec<u8>) -> Outcome {
        let data_base = self.calls.len() * ENTRY_SIZE;
        let buffers = self
            .buffers
            .iter()
            .map(|&(start, len)| (data_base + start, len))
            .collect();
        Outcome {
            image,
            buffers,
            first_call: 0,
        }
    }
}

/// What a program that ran to its end left behind.
#[derive(Debug)]
pub struct Outcome {
    image: Vec<u8>,
    buffers: Vec<(usize, usize)>,
    first_call: usize,
}

impl Outcome {
    /// What a program left behind that was appended to `first`.
    pub fn behind(mut self, first: &Program) -> Outcome {
        self.first_call += first.calls.len();
        self.buffers.drain(..first.buffers.len());
        self
    }

    /// The result of a call as the kernel gave it: negative errno on failure.
    pub fn result(&self, call: CallId) -> i64 {
        let at = (self.first_call + call.0) * ENTRY_SIZE + RESULT_OFFSET;
        i64::from_le_bytes(self.image[at..at + 8].try_into().expect("eight bytes"))
    }

    /// The bytes of a buffer after the run.
    pub fn data(&self, buffer: BufferId) -> &[u8] {
        let (start, len) = self.buffers[buffer.0];
        &self.image[start..start + len]
    }

    /// The eight bytes at this offset of a buffer.
    pub fn word(&self, buffer: BufferId, offset: usize) -> u64 {
        let bytes = &self.data(buffer)[offset..offset + 8];
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }
}

pub(crate) fn call_id(index: usize) -> CallId {
    CallId(index)
}
