//! `/proc/<pid>/cgroup`: where a task is in each hierarchy.

use super::text::{ParseError, lines};

/// One line: a hierarchy and the task's place in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CgroupMembership {
    /// Controllers joined with commas, or `name=NAME`; empty for cgroup v2.
    pub controllers: String,
    /// Path from the root of the reader's cgroup namespace.
    pub path: String,
}

/// Reads a whole `cgroup` file, in the kernel's order.
pub fn parse_cgroup(text: &[u8]) -> Result<Vec<CgroupMembership>, ParseError> {
    lines(text)
        .map(|line| {
            // The path may hold colons, the two fields before it may not.
            let mut parts = line.splitn(3, |&b| b == b':').skip(1);
            let word = |part: Option<&[u8]>| {
                part.and_then(|part| String::from_utf8(part.to_vec()).ok())
                    .ok_or_else(|| ParseError::new("cgroup", "membership", line))
            };
            Ok(CgroupMembership {
                controllers: word(parts.next())?,
                path: word(parts.next())?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_and_paths_with_colons_are_read() {
        let all =
            parse_cgroup(b"4:cpu,cpuacct:/a\n1:name=systemd:/b\n0::/x:y\n").expect("well formed");
        let pairs: Vec<_> = all
            .iter()
            .map(|m| (m.controllers.as_str(), m.path.as_str()))
            .collect();
        assert_eq!(
            pairs,
            [("cpu,cpuacct", "/a"), ("name=systemd", "/b"), ("", "/x:y")]
        );
        assert!(parse_cgroup(b"0:\n").is_err());
    }
}
