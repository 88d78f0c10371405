//! The table: what each message means. One row a cause; the first row that fits a line counts.

mod engines;
mod files;
mod images;
mod memory;
mod mounts;
mod network;
mod own;
mod tasks;
mod usage;

/// What a line with this message stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It says why.
    Cause,
    /// It is often the cause, but another row that fits another line says more.
    Consequence,
    /// It only passes on that something failed.
    Symptom,
}

/// One row. `$1` or `${1}` in the texts stands for what the pattern caught.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Regular expression over one line.
    pub pattern: &'static str,
    /// What a line with it stands for.
    pub role: Role,
    /// What happened, in two or three sentences.
    pub what: &'static str,
    /// What to do.
    pub remedy: &'static str,
    /// The exact option, setting or command.
    pub command: &'static str,
    /// Threads of issue trackers where people met it.
    pub threads: &'static [&'static str],
}

/// All rows in their order.
pub fn all() -> impl Iterator<Item = &'static Rule> + Clone {
    const TABLES: [&[Rule]; 9] = [
        images::RULES,
        files::RULES,
        mounts::RULES,
        tasks::RULES,
        network::RULES,
        memory::RULES,
        engines::RULES,
        usage::RULES,
        own::RULES,
    ];
    TABLES.into_iter().flatten()
}
