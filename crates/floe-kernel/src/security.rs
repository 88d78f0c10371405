//! Security modules that label tasks: which one is active here, and what it says about a thread.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use crate::namespace::own_proc_path;

/// The module whose labels tasks have. There is one at most: AppArmor and SELinux exclude each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SecurityModule {
    /// Tasks have no labels.
    #[default]
    None,
    /// Profiles by name.
    AppArmor,
    /// Contexts of four parts.
    SeLinux,
}

/// Where AppArmor shows its policy; only there while securityfs is mounted.
pub const APPARMOR_POLICY: &str = "/sys/kernel/security/apparmor/policy";

impl SecurityModule {
    /// Asks the kernel.
    pub fn active() -> Self {
        let apparmor = fs::read("/sys/module/apparmor/parameters/enabled");
        if apparmor.is_ok_and(|text| text.starts_with(b"Y")) {
            return SecurityModule::AppArmor;
        }
        let systems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        let has_selinux = systems.lines().any(|line| line.ends_with("\tselinuxfs"));
        // Without a policy every label is `kernel`, or the like.
        if has_selinux && own_text("attr/current").is_ok_and(|text| is_context(&text)) {
            return SecurityModule::SeLinux;
        }
        SecurityModule::None
    }

    /// Its name, as people and `--lsm-profile` have it.
    pub fn name(self) -> &'static str {
        match self {
            SecurityModule::None => "none",
            SecurityModule::AppArmor => "AppArmor",
            SecurityModule::SeLinux => "SELinux",
        }
    }

    /// The directory of its files below that of a thread in `/proc`. Since Linux 5.8 AppArmor has its own;
    /// what lies above is that of the module which the thread is to see.
    pub fn directory(self) -> &'static str {
        let own = Path::new("/proc/thread-self/attr/apparmor");
        match self {
            SecurityModule::AppArmor if own.exists() => "attr/apparmor",
            _ => "attr",
        }
    }

    /// The label in the text of an `attr` file. AppArmor says `NAME (MODE)`, and `unconfined` for none.
    pub fn label(self, text: &[u8]) -> Option<String> {
        let text = String::from_utf8_lossy(text);
        let mut label = text.trim_end_matches(['\0', '\n']);
        if self == SecurityModule::AppArmor {
            let mode = label
                .rsplit_once(" (")
                .filter(|(_, mode)| mode.ends_with(')'));
            label = mode.map_or(label, |(name, _)| name);
        }
        let is_none = label.is_empty() || self == SecurityModule::AppArmor && label == "unconfined";
        (!is_none).then(|| label.to_string())
    }

    /// The label of the calling thread.
    pub fn own_label(self) -> io::Result<Option<String>> {
        if self == SecurityModule::None {
            return Ok(None);
        }
        let text = fs::read(own_file(&format!("{}/current", self.directory())))?;
        Ok(self.label(&text))
    }
}

/// Whether this is a context of SELinux: user, role, type, and a level that may have colons itself.
pub fn is_context(label: &str) -> bool {
    label.matches(':').count() >= 3
}

/// Asks AppArmor whether the calling thread could take on a profile; nothing is changed. ENOENT where it is
/// not loaded, EACCES where the thread's own profile forbids it.
pub fn could_take_profile(label: &str) -> io::Result<()> {
    let directory = SecurityModule::AppArmor.directory();
    let text = format!("permprofile {label}");
    write_own(&format!("{directory}/current"), text.as_bytes())
}

/// Has SELinux label the sockets that the calling thread makes; by its usual rules with `None`.
pub fn label_new_sockets(label: Option<&str>) -> io::Result<()> {
    write_own("attr/sockcreate", label.unwrap_or("").as_bytes())
}

/// Whether SELinux lets `source` do this to a process of `target`; also where it only would not enforce it. `None`
/// where it cannot be asked: its file system is not mounted, or the policy has no such permission.
pub fn selinux_allows(source: &str, target: &str, permission: &str) -> Option<bool> {
    const PLACE: &str = "/sys/fs/selinux";
    let class = format!("{PLACE}/class/process");
    let number = fs::read_to_string(format!("{class}/index")).ok()?;
    let bit = fs::read_to_string(format!("{class}/perms/{permission}")).ok()?;
    let bit = bit.trim().parse::<u32>().ok()?.checked_sub(1)?;
    if fs::read(format!("{PLACE}/enforce")).is_ok_and(|text| text.starts_with(b"0")) {
        return Some(true);
    }
    let options = fs::File::options().read(true).write(true).clone();
    let mut query = options.open(format!("{PLACE}/access")).ok()?;
    let question = format!("{source} {target} {}", number.trim());
    query.write_all(question.as_bytes()).ok()?;
    let mut answer = [0; 256];
    let length = query.read(&mut answer).ok()?;
    allowed_of(std::str::from_utf8(&answer[..length]).ok()?, bit)
}

/// Allowed, decided, audited (twice), sequence, flags: the first flag is that of a permissive domain.
fn allowed_of(answer: &str, bit: u32) -> Option<bool> {
    let words: Vec<&str> = answer.trim_end_matches('\0').split_whitespace().collect();
    let number = |at: usize| u32::from_str_radix(words.get(at)?, 16).ok();
    let is_permissive = number(5).is_some_and(|flags| flags & 1 != 0);
    Some(is_permissive || number(0)? & 1u32.checked_shl(bit)? != 0)
}

fn own_file(name: &str) -> String {
    own_proc_path(&format!("thread-self/{name}"))
}

fn own_text(name: &str) -> io::Result<String> {
    fs::read_to_string(own_file(name))
}

/// The kernel wants all of it in one call, and takes an empty one to mean none.
fn write_own(name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::File::options().write(true).open(own_file(name))?;
    file.write(bytes).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_of_a_profile_is_no_part_of_its_label() {
        let label = |text: &str| SecurityModule::AppArmor.label(text.as_bytes());
        assert_eq!(
            label("docker-default (enforce)\n").as_deref(),
            Some("docker-default")
        );
        assert_eq!(label("crun (unconfined)\n").as_deref(), Some("crun"));
        assert_eq!(
            label("my program (complain)\n").as_deref(),
            Some("my program")
        );
        assert_eq!(label("a//&:ns:b (mixed)\n").as_deref(), Some("a//&:ns:b"));
        assert_eq!(
            label("/usr/bin/x (y)z\n").as_deref(),
            Some("/usr/bin/x (y)z")
        );
    }

    #[test]
    fn unconfined_is_no_label_of_apparmor() {
        assert_eq!(SecurityModule::AppArmor.label(b"unconfined\n"), None);
        assert_eq!(SecurityModule::AppArmor.label(b""), None);
    }

    #[test]
    fn a_decision_of_selinux_is_read() {
        let decision = "2 ffffffff 0 ffffffff 1 0";
        assert_eq!(allowed_of(decision, 1), Some(true));
        assert_eq!(allowed_of(decision, 0), Some(false));
        assert_eq!(allowed_of("0 ffffffff 0 ffffffff 1 1", 0), Some(true));
        for garbled in ["", "x", "2 3"] {
            assert_ne!(allowed_of(garbled, 0), Some(true), "{garbled}");
        }
        assert_eq!(allowed_of(decision, 99), None);
    }

    #[test]
    fn a_context_of_selinux_is_taken_as_it_is() {
        let text = "system_u:system_r:container_t:s0:c82,c137";
        let label = SecurityModule::SeLinux.label(format!("{text}\0").as_bytes());
        assert_eq!(label.as_deref(), Some(text));
        assert!(is_context(text) && !is_context("kernel"));
    }
}
