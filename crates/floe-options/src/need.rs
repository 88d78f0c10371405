//! What images ask of a restore's command line.

use crate::{External, InheritFd, RestoreOptions};

/// An option without which a restore cannot be planned, since the dump left something to the outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// Established TCP connections.
    TcpConnections,
    /// A unix socket, by its inode, that is connected to the outside.
    UnixPeer(u32),
    /// A terminal whose master was not dumped.
    ShellJob,
    /// Mounts that were found outside by themselves.
    AutomaticMounts,
    /// A mount that the dump was told to be external, by its name.
    Mount(String),
    /// A device that the dump was told to be external, by its name.
    Device(String),
    /// A descriptor that stands for what was not saved: `tty[RDEV:DEV]`, `file[MNT:INODE]`, a key.
    Descriptor(String),
}

impl Need {
    /// The option as a user gives it; words in capitals are the user's to fill in.
    pub fn option(&self) -> String {
        match self {
            Need::TcpConnections => "--tcp-established".into(),
            Need::UnixPeer(_) => "--ext-unix-sk".into(),
            Need::ShellJob => "--shell-job".into(),
            Need::AutomaticMounts => "--external 'mnt[]'".into(),
            Need::Mount(name) => format!("--external 'mnt[{name}]:PATH'"),
            Need::Device(name) => format!("--external 'dev[{name}]:PATH'"),
            Need::Descriptor(resource) => format!("--inherit-fd 'fd[N]:{resource}'"),
        }
    }

    /// What to do, with the choice that there is.
    pub fn remedy(&self) -> String {
        match self {
            Need::TcpConnections => {
                "use --tcp-established to keep it, or --tcp-close to give it up".into()
            }
            Need::UnixPeer(inode) => format!(
                "use --ext-unix-sk to connect it to that name anew, or hand a connected one over with \
                 --inherit-fd 'fd[N]:socket:[{inode}]'"
            ),
            Need::ShellJob => {
                "use --shell-job to take the terminal that you work in instead".into()
            }
            Need::AutomaticMounts => {
                "use --external mnt[] (or --ext-mount-map auto) at the restore too".into()
            }
            Need::Mount(name) => format!("say where it is now by --external mnt[{name}]:PATH"),
            Need::Device(name) => format!("say where it is now by --external dev[{name}]:PATH"),
            Need::Descriptor(resource) => {
                format!("open it and hand it over with --inherit-fd fd[N]:{resource}")
            }
        }
    }

    /// Adds the option, for a plan that is made only to be looked at: paths and descriptors lead nowhere.
    pub fn assume(&self, options: &mut RestoreOptions) {
        match self {
            Need::TcpConnections => options.sockets.tcp_established = true,
            Need::UnixPeer(_) => options.sockets.external_unix = true,
            Need::ShellJob => options.shell_job = true,
            Need::AutomaticMounts => options.external.push(External::MountAuto {
                masters: true,
                sharing: true,
            }),
            Need::Mount(name) => options.external.push(External::Mount {
                key: name.clone(),
                value: "/".into(),
            }),
            Need::Device(name) => options.external.push(External::Device {
                key: name.clone(),
                value: "/".into(),
            }),
            Need::Descriptor(resource) => options.inherit_fds.push(InheritFd {
                fd: 0,
                resource: resource.clone(),
            }),
        }
    }
}
