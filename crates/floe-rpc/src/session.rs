//! One connection, from its first request to its end.

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;

use floe_image::messages::{
    CriuDumpResp, CriuFeatures, CriuOpts, CriuPageServerInfo, CriuReq, CriuReqType, CriuResp,
    CriuRestoreResp, CriuVersion,
};
use floe_inject::{EngineEnd, Split, Watch};
use floe_options::command::Command;
use floe_options::config::{MayBeAbsent, apply_file};
use floe_options::{Hooks, Settings};

use crate::directories::{Context, Directories, Images, open_status};
use crate::notify::{Notifier, chain};
use crate::options::{Started, apply};
use crate::server::{self, Parentage};
use crate::{Channel, ChannelError, Engine, Refusal};

/// The version of CRIU that we answer for.
const VERSION: (i32, i32) = (4, 2);

/// Whether an operation was done; what the process says by its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Every request was done.
    Done,
    /// One was not; the caller was told why if it could be.
    Failed,
}

/// What a request leaves to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Nothing: the process ends.
    Finished(End),
    /// The caller may send the next one.
    Next(After),
}

/// Which request may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Any.
    Any,
    /// A pre-dump leaves the connection open for another one, or for the dump.
    PreDump,
}

/// The answers to one caller.
pub struct Session<'e> {
    channel: Arc<Channel>,
    engine: &'e dyn Engine,
    started: Started,
}

/// A request that has been understood.
struct Prepared {
    settings: Settings,
    hooks: Option<Arc<dyn Hooks>>,
    _directories: Directories,
}

impl<'e> Session<'e> {
    /// A session with a caller that started this process and gave it `channel`.
    pub fn with_parent(channel: Channel, engine: &'e dyn Engine) -> Self {
        Self::new(channel, engine, Started::ByCaller)
    }

    /// A session with a caller that connected to a service.
    pub(crate) fn with_client(channel: Channel, engine: &'e dyn Engine) -> Self {
        Self::new(channel, engine, Started::AsService)
    }

    fn new(channel: Channel, engine: &'e dyn Engine, started: Started) -> Self {
        Self {
            channel: Arc::new(channel),
            engine,
            started,
        }
    }

    /// Answers requests until the last one; this process must have one thread, and ends afterwards.
    pub fn serve(&self) -> End {
        let mut after = After::Any;
        loop {
            let request = match self.channel.receive() {
                Ok(Some(request)) => request,
                Ok(None) => return End::Done,
                Err(error @ ChannelError::Socket { .. }) => {
                    tracing::error!("{}", chain(&error));
                    return End::Failed;
                }
                Err(error) => {
                    let refusal = Refusal::bad_request(chain(&error));
                    return self.refuse(response(CriuReqType::Empty), refusal);
                }
            };
            match self.answer(request, after) {
                Served::Next(next) => after = next,
                Served::Finished(end) => return end,
            }
        }
    }

    fn answer(&self, request: CriuReq, after: After) -> Served {
        use CriuReqType as Type;
        let kind = CriuReqType::try_from(request.r#type).unwrap_or(Type::Empty);
        if after == After::PreDump && !matches!(kind, Type::PreDump | Type::Dump) {
            let refusal = Refusal::bad_request("after PRE_DUMP only PRE_DUMP or DUMP can follow");
            return Served::Finished(self.refuse(response(Type::Empty), refusal));
        }
        let keep_open = request.keep_open == Some(true);
        if keep_open && !may_keep_open(kind) {
            let refusal = Refusal::bad_request(format!("{kind:?} cannot be asked with keep_open"));
            return Served::Finished(self.refuse(response(kind), refusal));
        }
        let opts = request.opts.as_ref();
        let end = match kind {
            Type::Dump => return Served::Finished(self.dump(kind, opts)),
            Type::SinglePreDump => return Served::Finished(self.dump(kind, opts)),
            Type::PreDump => {
                return match self.dump(kind, opts) {
                    End::Done => Served::Next(After::PreDump),
                    End::Failed => Served::Finished(End::Failed),
                };
            }
            Type::Restore => self.restore(opts),
            Type::Check => self.reply(response(kind), self.check(opts)),
            Type::CpuinfoDump => {
                self.reply(response(kind), self.cpuinfo(Command::CpuinfoDump, opts))
            }
            Type::CpuinfoCheck => {
                self.reply(response(kind), self.cpuinfo(Command::CpuinfoCheck, opts))
            }
            Type::FeatureCheck => self.features(request.features.unwrap_or_default()),
            Type::Version => self.version(),
            Type::WaitPid => self.wait_for(request.pid),
            Type::PageServer => self.start_page_server(opts, Parentage::Orphan),
            Type::PageServerChld => self.start_page_server(opts, Parentage::Child),
            Type::Notify | Type::Empty => {
                let text = format!("request type {} is not known here", request.r#type);
                self.refuse(response(Type::Empty), Refusal::bad_request(text))
            }
        };
        match end {
            End::Done if keep_open => Served::Next(After::Any),
            end => Served::Finished(end),
        }
    }

    /// Understands the options of a request, and starts the log.
    fn prepare(&self, opts: Option<&CriuOpts>, images: Images) -> Result<Prepared, Refusal> {
        let nothing = CriuOpts {
            images_dir_fd: -1,
            ..CriuOpts::default()
        };
        let opts = opts.unwrap_or(&nothing);
        let mut settings = self.engine.defaults()?;
        let refuse = |error: &dyn std::error::Error| Refusal::bad_request(chain(error));
        apply(opts, self.started, &mut settings).map_err(|error| refuse(&error))?;
        // What the request's own configuration file says overrides the request, directories included.
        settings.images_dir = None;
        let work_dir = settings.work_dir.take();
        if let Some(file) = &opts.config_file {
            apply_file(Path::new(file), MayBeAbsent::Yes, &mut settings)
                .map_err(|error| refuse(&error))?;
        }
        let context = Context {
            peer: self.channel.peer(),
            images,
            work_dir,
        };
        let directories = Directories::resolve(opts, context, &mut settings);
        let directories = directories.map_err(|error| refuse(&error))?;
        self.engine.start_log(&settings)?;
        tracing::debug!("asked with {opts:?}");
        let hooks: Option<Arc<dyn Hooks>> = match opts.notify_scripts {
            Some(true) => Some(Arc::new(Notifier::new(self.channel.clone()))),
            _ => None,
        };
        Ok(Prepared {
            settings,
            hooks,
            _directories: directories,
        })
    }

    /// The engine is a child of ours, so that the tasks are put right even if it is killed. It says itself
    /// how it ended, by a response and its exit code.
    fn dump(&self, kind: CriuReqType, opts: Option<&CriuOpts>) -> End {
        let answer = CriuResp {
            dump: (kind == CriuReqType::Dump).then_some(CriuDumpResp {
                restored: Some(false),
            }),
            ..response(kind)
        };
        let supervisor = match floe_inject::split() {
            Ok(Split::Supervisor(supervisor)) => supervisor,
            Ok(Split::Engine(watch)) => {
                let done = undisturbed(|| self.dump_watched(kind, opts, &watch));
                let end = self.reply(answer, done);
                std::process::exit(end.code());
            }
            Err(error) => {
                return self.refuse(
                    answer,
                    Refusal::new(format!("starting the engine: {error}")),
                );
            }
        };
        match supervisor.wait() {
            Ok(EngineEnd::Exited(code)) if code == End::Done.code() => End::Done,
            Ok(EngineEnd::Exited(code)) if code == End::Failed.code() => End::Failed,
            Ok(EngineEnd::Exited(code)) => self.refuse(
                answer,
                Refusal::new(format!("the engine ended with {code}")),
            ),
            Ok(EngineEnd::Killed(signal)) => {
                let text =
                    format!("the dump was killed by signal {signal}; the tasks run on as before");
                self.refuse(answer, Refusal::new(text))
            }
            Err(error) => {
                let text = format!("waiting for the engine: {error}");
                self.refuse(answer, Refusal::new(text))
            }
        }
    }

    fn dump_watched(
        &self,
        kind: CriuReqType,
        opts: Option<&CriuOpts>,
        watch: &Watch,
    ) -> Result<(), Refusal> {
        let Prepared {
            settings,
            hooks,
            _directories,
        } = self.prepare(opts, Images::Needed)?;
        if settings.tree.is_none() {
            return Err(Refusal::bad_request(
                "the request names no pid: a caller that dumps itself is not supported",
            ));
        }
        let (command, hooks) = match kind {
            CriuReqType::Dump => (Command::Dump, hooks),
            // Nothing is locked or ended, so there is no stage to take part in.
            _ => (Command::PreDump, None),
        };
        self.engine.dump(command, &settings, hooks, watch)
    }

    /// Restores in this very process: the root becomes its child, or its sibling.
    fn restore(&self, opts: Option<&CriuOpts>) -> End {
        let answer = |pid| CriuResp {
            restore: Some(CriuRestoreResp { pid }),
            ..response(CriuReqType::Restore)
        };
        let restored = undisturbed(|| {
            let prepared = self.prepare(opts, Images::Needed)?;
            self.engine.restore(&prepared.settings, prepared.hooks)
        });
        let words = opts
            .map(|opts| opts.exec_cmd.as_slice())
            .unwrap_or_default();
        match restored {
            Ok(root) if words.is_empty() => self.reply(answer(root.0), Ok(())),
            Ok(root) => {
                self.reply(answer(root.0), Ok(()));
                report(&self.engine.become_command(words));
                End::Failed
            }
            Err(refusal) => self.refuse(answer(-1), refusal),
        }
    }

    /// Answers once a process of its own listens for pages. The caller may wait for a child of ours.
    fn start_page_server(&self, opts: Option<&CriuOpts>, parentage: Parentage) -> End {
        let answer = response(CriuReqType::PageServer);
        match server::start(parentage, |ready| {
            let prepared = self.prepare(opts, Images::Needed)?;
            let status = opts.and_then(|opts| opts.status_fd);
            let status = status.map(|fd| open_status(self.channel.peer(), fd));
            let status = status
                .transpose()
                .map_err(|error| Refusal::bad_request(chain(&error)))?;
            self.engine.page_server(&prepared.settings, &mut |port| {
                if let Some(status) = &status
                    && let Err(error) = rustix::io::write(status, &[0])
                {
                    tracing::warn!(%error, "nobody hears by status_fd that the server is ready");
                }
                ready(port);
            })
        }) {
            Ok((pid, port)) => {
                let ps = CriuPageServerInfo {
                    pid: Some(pid),
                    port: Some(port.into()),
                    ..CriuPageServerInfo::default()
                };
                self.reply(
                    CriuResp {
                        ps: Some(ps),
                        ..answer
                    },
                    Ok(()),
                )
            }
            Err(refusal) => self.refuse(answer, refusal),
        }
    }

    fn check(&self, opts: Option<&CriuOpts>) -> Result<(), Refusal> {
        // Without a log nothing of the options matters.
        let logged =
            opts.filter(|opts| opts.log_file.is_some() && opts.log_to_stderr != Some(true));
        match logged {
            Some(opts) => {
                let prepared = self.prepare(Some(opts), Images::NotNeeded)?;
                self.engine.check(&prepared.settings)
            }
            None => self.engine.check(&Settings::default()),
        }
    }

    fn cpuinfo(&self, command: Command, opts: Option<&CriuOpts>) -> Result<(), Refusal> {
        let prepared = self.prepare(opts, Images::Needed)?;
        self.engine.cpuinfo(command, &prepared.settings)
    }

    fn features(&self, asked: CriuFeatures) -> End {
        let has =
            |asked: Option<bool>, name| Some(asked == Some(true) && self.engine.has_feature(name));
        let features = CriuFeatures {
            mem_track: has(asked.mem_track, "mem_dirty_track"),
            lazy_pages: has(asked.lazy_pages, "lazy_pages"),
            pidfd_store: has(asked.pidfd_store, "pidfd_store"),
        };
        let answer = CriuResp {
            features: Some(features),
            ..response(CriuReqType::FeatureCheck)
        };
        self.reply(answer, Ok(()))
    }

    fn version(&self) -> End {
        let version = CriuVersion {
            major_number: VERSION.0,
            minor_number: VERSION.1,
            ..CriuVersion::default()
        };
        let answer = CriuResp {
            version: Some(version),
            ..response(CriuReqType::Version)
        };
        self.reply(answer, Ok(()))
    }

    /// Waits for a child of ours, such as a page server that an earlier request started.
    fn wait_for(&self, pid: Option<u32>) -> End {
        use rustix::io::Errno;
        let pid = pid.and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.and_then(rustix::process::Pid::from_raw);
        let waited = match pid.filter(|pid| pid.as_raw_nonzero().get() > 0) {
            Some(_) => rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()),
            None => Err(Errno::CHILD),
        };
        let answer = response(CriuReqType::WaitPid);
        match waited {
            Ok(Some((_, status))) => {
                let status = Some(status.as_raw());
                self.reply(CriuResp { status, ..answer }, Ok(()))
            }
            Ok(None) => self.refuse(answer, Refusal::new("the child has not ended")),
            Err(errno) => {
                let refusal = Refusal::new(format!("waiting for the child: {errno}"));
                self.refuse(answer, refusal.with_errno(errno.raw_os_error()))
            }
        }
    }

    fn refuse(&self, answer: CriuResp, refusal: Refusal) -> End {
        self.reply(answer, Err(refusal))
    }

    /// Sends the response, and says whether the request was done and the caller knows.
    fn reply(&self, mut answer: CriuResp, done: Result<(), Refusal>) -> End {
        answer.success = done.is_ok();
        if let Err(refusal) = &done {
            report(refusal);
            answer.cr_errno = refusal.errno;
            answer.cr_errmsg = Some(refusal.lines.join("\n"));
        }
        match self.channel.send(&answer) {
            Ok(()) if done.is_ok() => End::Done,
            Ok(()) => End::Failed,
            Err(error) => {
                tracing::error!("{}", chain(&error));
                End::Failed
            }
        }
    }
}

impl End {
    /// The exit code that stands for it.
    pub fn code(self) -> i32 {
        match self {
            End::Done => 0,
            End::Failed => 1,
        }
    }
}

fn response(kind: CriuReqType) -> CriuResp {
    CriuResp {
        r#type: kind.into(),
        ..CriuResp::default()
    }
}

/// Those that leave nothing behind in this process.
fn may_keep_open(kind: CriuReqType) -> bool {
    use CriuReqType as Type;
    matches!(
        kind,
        Type::PageServer
            | Type::PageServerChld
            | Type::CpuinfoDump
            | Type::CpuinfoCheck
            | Type::FeatureCheck
            | Type::Version
    )
}

fn report(refusal: &Refusal) {
    for line in &refusal.lines {
        tracing::error!("{line}");
    }
}

/// A bug of ours is an answer too: the caller must not be left without one.
fn undisturbed<T>(work: impl FnOnce() -> Result<T, Refusal>) -> Result<T, Refusal> {
    std::panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
        let text = text.unwrap_or("no message");
        Err(Refusal::new(format!("this is a bug in floe: {text}")))
    })
}
