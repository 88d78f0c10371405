#![forbid(unsafe_code)]

pub mod restore;
