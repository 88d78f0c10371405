//! What differs between architectures; each file exports the same items.

#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod current;
#[cfg(not(target_arch = "x86_64"))]
#[path = "other.rs"]
mod current;

pub(crate) use current::cpu_facts;
