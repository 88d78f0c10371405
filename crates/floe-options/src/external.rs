//! Resources outside of the checkpoint: `--external`, `--inherit-fd`, `--ext-mount-map`.

/// One `--external TYPE[ID]:VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum External {
    /// `mnt[KEY]:VALUE`: at dump mount point and name, at restore name and host path.
    Mount { key: String, value: String },
    /// `mnt[]:FLAGS`: every external bind mount; `m` takes masters, `s` shared ones too.
    MountAuto { masters: bool, sharing: bool },
    /// `dev[KEY]:VALUE`: at dump `major/minor` and name, at restore name and device path.
    Device { key: String, value: String },
    /// `file[MNT_ID:INODE]`, both hexadecimal as CRIU prints them.
    File { mnt_id: u64, inode: u64 },
    /// `tty[RDEV:DEV]`, both hexadecimal.
    Tty { rdev: u64, dev: u64 },
    /// `unix[INODE]`, decimal.
    UnixSocket { inode: u64 },
    /// `net[INODE]:NAME`.
    NetNamespace { inode: u64, name: String },
    /// `pid[INODE]:NAME`.
    PidNamespace { inode: u64, name: String },
    /// `veth[INNER]:OUTER[@BRIDGE]`.
    Veth {
        inner: String,
        outer: String,
        bridge: Option<String>,
    },
    /// `macvlan[INNER]:OUTER`.
    Macvlan { inner: String, outer: String },
    /// `netdev[NAME]:ORIGINAL`.
    NetDevice { name: String, original: String },
    /// `apparmor:LABEL` or `selinux:LABEL`: LXC says here once more what it says by `--lsm-profile`; it means
    /// nothing.
    LsmLabel(String),
}

/// Why a value of `--external`, `--inherit-fd` or `--ext-mount-map` is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExternalError {
    #[error("expected TYPE[ID]:VALUE, got `{0}`")]
    Shape(String),
    #[error(
        "`{0}` is not a type of external resource; there are mnt, dev, file, tty, unix, net, pid, veth, macvlan, netdev"
    )]
    Type(String),
    #[error("`{value}` in `{whole}` is not a {what}")]
    Number {
        value: String,
        what: &'static str,
        whole: String,
    },
    #[error("`{0}` lacks the part after the colon")]
    NoValue(String),
    #[error("expected fd[NUMBER]:RESOURCE, got `{0}`")]
    InheritShape(String),
    #[error("expected KEY:VALUE or `auto`, got `{0}`")]
    MountShape(String),
}

impl External {
    /// Reads one value of `--external`.
    pub fn parse(text: &str) -> Result<Self, ExternalError> {
        if text.starts_with("apparmor:") || text.starts_with("selinux:") {
            return Ok(Self::LsmLabel(text.into()));
        }
        let (kind, rest) = text
            .split_once('[')
            .ok_or_else(|| ExternalError::Shape(text.into()))?;
        // The id of a mount may hold brackets itself, the text after `]:` hardly does.
        let (id, value) = match rest.rfind("]:") {
            Some(at) => (&rest[..at], Some(&rest[at + 2..])),
            None => (
                rest.strip_suffix(']')
                    .ok_or_else(|| ExternalError::Shape(text.into()))?,
                None,
            ),
        };
        let field = Field {
            whole: text,
            id,
            value,
        };
        Ok(match kind {
            "mnt" if id.is_empty() => Self::auto(field)?,
            "mnt" => Self::Mount {
                key: id.into(),
                value: field.value()?,
            },
            "dev" => Self::Device {
                key: id.into(),
                value: field.value()?,
            },
            "file" => {
                let (mnt_id, inode) = field.hex_pair()?;
                Self::File { mnt_id, inode }
            }
            "tty" => {
                let (rdev, dev) = field.hex_pair()?;
                Self::Tty { rdev, dev }
            }
            "unix" => Self::UnixSocket {
                inode: field.inode()?,
            },
            "net" => Self::NetNamespace {
                inode: field.inode()?,
                name: field.value()?,
            },
            "pid" => Self::PidNamespace {
                inode: field.inode()?,
                name: field.value()?,
            },
            "veth" => {
                let value = field.value()?;
                let (outer, bridge) = match value.split_once('@') {
                    Some((outer, bridge)) => (outer.to_owned(), Some(bridge.to_owned())),
                    None => (value, None),
                };
                Self::Veth {
                    inner: id.into(),
                    outer,
                    bridge,
                }
            }
            "macvlan" => Self::Macvlan {
                inner: id.into(),
                outer: field.value()?,
            },
            "netdev" => Self::NetDevice {
                name: id.into(),
                original: field.value()?,
            },
            other => return Err(ExternalError::Type(other.into())),
        })
    }

    fn auto(field: Field<'_>) -> Result<Self, ExternalError> {
        let flags = field.value.unwrap_or("");
        if let Some(bad) = flags.chars().find(|c| !matches!(c, 'm' | 's')) {
            return Err(ExternalError::Number {
                value: bad.to_string(),
                what: "flag of mnt[] (there are m and s)",
                whole: field.whole.into(),
            });
        }
        Ok(Self::MountAuto {
            masters: flags.contains('m'),
            sharing: flags.contains('s'),
        })
    }
}

struct Field<'a> {
    whole: &'a str,
    id: &'a str,
    value: Option<&'a str>,
}

impl Field<'_> {
    fn value(&self) -> Result<String, ExternalError> {
        match self.value {
            Some(value) if !value.is_empty() => Ok(value.into()),
            _ => Err(ExternalError::NoValue(self.whole.into())),
        }
    }

    fn number(&self, text: &str, radix: u32, what: &'static str) -> Result<u64, ExternalError> {
        u64::from_str_radix(text, radix).map_err(|_| ExternalError::Number {
            value: text.into(),
            what,
            whole: self.whole.into(),
        })
    }

    fn inode(&self) -> Result<u64, ExternalError> {
        self.number(self.id, 10, "decimal inode number")
    }

    fn hex_pair(&self) -> Result<(u64, u64), ExternalError> {
        let (left, right) = self
            .id
            .split_once(':')
            .ok_or_else(|| ExternalError::Shape(self.whole.into()))?;
        Ok((
            self.number(left, 16, "hexadecimal number")?,
            self.number(right, 16, "hexadecimal number")?,
        ))
    }
}

/// One `--inherit-fd fd[N]:RESOURCE`: a descriptor of the caller stands for a saved one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InheritFd {
    /// The caller's descriptor.
    pub fd: i32,
    /// The saved resource, as CRIU writes it: `tty[RDEV:DEV]`, `pipe:[INODE]`, `socket:[INODE]`,
    /// `file[MNT_ID:INODE]`, or a path.
    pub resource: String,
}

impl InheritFd {
    /// Reads one value of `--inherit-fd`.
    pub fn parse(text: &str) -> Result<Self, ExternalError> {
        let bad = || ExternalError::InheritShape(text.into());
        let (number, resource) = text
            .strip_prefix("fd[")
            .and_then(|rest| rest.split_once("]:"))
            .ok_or_else(bad)?;
        let fd = number.parse().ok().filter(|fd| *fd >= 0).ok_or_else(bad)?;
        if resource.is_empty() {
            return Err(bad());
        }
        Ok(Self {
            fd,
            resource: resource.into(),
        })
    }
}

/// One `--ext-mount-map KEY:VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtMount {
    /// At dump a mount point, at restore the name in the image.
    pub key: String,
    /// At dump the name in the image, at restore a path of the host.
    pub value: String,
}

impl ExtMount {
    /// Reads one value of `--ext-mount-map`, `auto` excepted.
    pub fn parse(text: &str) -> Result<Self, ExternalError> {
        match text.split_once(':') {
            Some((key, value)) if !key.is_empty() => Ok(Self {
                key: key.into(),
                value: value.into(),
            }),
            _ => Err(ExternalError::MountShape(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn external_forms_are_read_as_criu_documents_them() {
        let cases = [
            (
                "mnt[/data]:store",
                External::Mount {
                    key: "/data".into(),
                    value: "store".into(),
                },
            ),
            (
                "apparmor:unconfined",
                External::LsmLabel("apparmor:unconfined".into()),
            ),
            (
                "mnt[]",
                External::MountAuto {
                    masters: false,
                    sharing: false,
                },
            ),
            (
                "mnt[]:ms",
                External::MountAuto {
                    masters: true,
                    sharing: true,
                },
            ),
            (
                "dev[8/1]:disk",
                External::Device {
                    key: "8/1".into(),
                    value: "disk".into(),
                },
            ),
            (
                "file[1f:2a]",
                External::File {
                    mnt_id: 0x1f,
                    inode: 0x2a,
                },
            ),
            (
                "tty[8800:19]",
                External::Tty {
                    rdev: 0x8800,
                    dev: 0x19,
                },
            ),
            ("unix[4711]", External::UnixSocket { inode: 4711 }),
            (
                "net[4026531840]:n",
                External::NetNamespace {
                    inode: 4026531840,
                    name: "n".into(),
                },
            ),
            (
                "veth[eth0]:v0@br0",
                External::Veth {
                    inner: "eth0".into(),
                    outer: "v0".into(),
                    bridge: Some("br0".into()),
                },
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(External::parse(text).as_ref(), Ok(&expected), "{text}");
        }
        for bad in [
            "", "mnt", "mnt[x", "mnt[x]", "file[1]", "unix[x]", "bpf[1]", "mnt[]:q", "net[1]",
        ] {
            assert!(External::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn inherit_fd_needs_number_and_resource() {
        assert_eq!(
            InheritFd::parse("fd[3]:pipe:[77]"),
            Ok(InheritFd {
                fd: 3,
                resource: "pipe:[77]".into()
            })
        );
        for bad in ["3:x", "fd[x]:y", "fd[3]:", "fd[-1]:x", "fd[3]"] {
            assert!(InheritFd::parse(bad).is_err(), "{bad}");
        }
    }
}
