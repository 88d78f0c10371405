#![forbid(unsafe_code)]

pub mod cpu;
pub mod restore;
