//! `floe swrk` and `floe service`: the engine as CRIU's callers reach it.
//!
//! Standard output and error belong to the program that is restored: nothing is ever written there.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use floe_dump::{DumpError, FreezeError};
use floe_inject::Watch;
use floe_kernel::child::Fork;
use floe_kernel::features::{KernelFeatures, ProbeContext, find};
use floe_kernel::ids::HostPid;
use floe_options::command::Command;
use floe_options::{Hooks, Settings};
use floe_resources::restore::PlanError;
use floe_restore::RestoreError;
use floe_rpc::service::{DEFAULT_ADDRESS, Role, Service};
use floe_rpc::{Channel, End, Engine, Refusal, Session};
use rustix::io::Errno;

use crate::exit::{Exit, Failure};
use crate::logging::Log;
use crate::page_server::PageServer;
use crate::scripts::CallerAndScripts;
use crate::{background, check, command, cpuinfo, engine};

/// Answers the caller that started us with one end of a pair of sockets.
pub fn answer_parent(fd: &str) -> Result<Exit, Failure> {
    let number: i32 = fd.parse().map_err(anyhow::Error::from)?;
    let taken = floe_kernel::inherited::take(number);
    let socket = taken.map_err(|error| anyhow::anyhow!("descriptor {number}: {error}"))?;
    let channel = Channel::new(socket).map_err(anyhow::Error::from)?;
    let log = Log::install();
    log_panics();
    let end = Session::with_parent(channel, &Program { log }).serve();
    Ok(exit(end))
}

/// Listens on the socket of `--address` until it is ended.
pub fn serve(settings: &Settings, log: Log) -> Result<Exit, Failure> {
    let address = settings.server.address.as_deref();
    let service = Service::bind(Path::new(address.unwrap_or(DEFAULT_ADDRESS)));
    let service = service.map_err(anyhow::Error::from)?;
    if settings.detached
        && let Fork::Parent(_) = background::enter()?
    {
        return Ok(Exit::Done);
    }
    background::write_pidfile(settings, rustix::process::getpid())?;
    background::tell_ready(settings)?;
    log_panics();
    tracing::info!("waiting for connections");
    match service.run(&Program { log }).map_err(anyhow::Error::from)? {
        Role::Worker(end) => Ok(exit(end)),
    }
}

/// A panic would be printed on standard error, which is not ours.
fn log_panics() {
    std::panic::set_hook(Box::new(|info| tracing::error!("{info}")));
}

fn exit(end: End) -> Exit {
    match end {
        End::Done => Exit::Done,
        End::Failed => Exit::Failed,
    }
}

/// This program, as requests use it.
struct Program {
    log: Log,
}

impl Program {
    fn hooks(
        settings: &Settings,
        caller: Option<Arc<dyn Hooks>>,
    ) -> Result<Arc<dyn Hooks>, Failure> {
        let scripts = command::scripts(settings)?;
        Ok(match caller {
            Some(caller) => Arc::new(CallerAndScripts { caller, scripts }),
            None => scripts,
        })
    }

    fn dump_watched(
        kind: Command,
        settings: &Settings,
        caller: Option<Arc<dyn Hooks>>,
        watch: &Watch,
    ) -> Result<(), Failure> {
        command::refuse_not_yet(kind, settings)?;
        // Callers fill one set of options for a dump and its restore, for which these are.
        let asked = Settings {
            inherit_fds: Vec::new(),
            sibling: false,
            ..settings.clone()
        };
        asked.check(kind, &[])?;
        let options = settings.dump_options(Self::hooks(settings, caller)?)?;
        let features = KernelFeatures::probe();
        match kind {
            Command::Dump if settings.iterate => {
                let say = |line: &str| tracing::info!("{}", line.trim_end());
                engine::dump_in_rounds(
                    (&options, None),
                    settings.rounds,
                    (&features, watch),
                    &say,
                )?;
            }
            Command::Dump => engine::dump(&options, &features, watch)?,
            _ => engine::pre_dump(&options, &features, watch)?,
        }
        if let Some(codec) = &settings.compress {
            engine::compress(&options.place.images_dir, codec)?;
        }
        if settings.display_stats {
            command::show_statistics(&options.place.work_dir)?;
        }
        tracing::info!("Dumping finished successfully");
        Ok(())
    }
}

impl Engine for Program {
    fn defaults(&self) -> Result<Settings, Refusal> {
        command::by_files(&Settings::default()).map_err(refusal)
    }

    fn start_log(&self, settings: &Settings) -> Result<(), Refusal> {
        let path = settings.log_path();
        let opened = self.log.open(path.as_deref(), settings.log.level);
        opened.map(drop).map_err(|error| {
            let shown = path.unwrap_or_else(|| PathBuf::from("-"));
            Refusal::new(format!("log file {}: {error}", shown.display()))
        })
    }

    fn dump(
        &self,
        kind: Command,
        settings: &Settings,
        hooks: Option<Arc<dyn Hooks>>,
        watch: &Watch,
    ) -> Result<(), Refusal> {
        Self::dump_watched(kind, settings, hooks, watch).map_err(refusal)
    }

    fn restore(
        &self,
        settings: &Settings,
        hooks: Option<Arc<dyn Hooks>>,
    ) -> Result<HostPid, Refusal> {
        let restore = || {
            command::refuse_not_yet(Command::Restore, settings)?;
            let options = settings.restore_options(Self::hooks(settings, hooks)?);
            let root = engine::restore(&options, &KernelFeatures::probe())?;
            if settings.display_stats {
                command::show_restore_statistics(&options.place.work_dir)?;
            }
            Ok(root)
        };
        restore().map_err(refusal)
    }

    fn become_command(&self, words: &[String]) -> Refusal {
        let Some((program, args)) = words.split_first() else {
            return Refusal::bad_request("exec_cmd names no program");
        };
        let error = std::process::Command::new(program).args(args).exec();
        Refusal::new(format!("becoming {program}: {error}"))
    }

    fn check(&self, _settings: &Settings) -> Result<(), Refusal> {
        check::essentials().map_err(|missing| {
            let missing = missing
                .iter()
                .map(|feature| format!("{} is missing: {}", feature.purpose, feature.without));
            Refusal {
                errno: None,
                lines: missing.collect(),
            }
        })
    }

    fn has_feature(&self, name: &str) -> bool {
        // Pages on demand need more of us than of the kernel.
        name != "lazy_pages"
            && find(name).is_some_and(|feature| feature.present(&ProbeContext::default()))
    }

    fn page_server(&self, settings: &Settings, ready: &mut dyn FnMut(u16)) -> Result<(), Refusal> {
        let mut serve = || {
            command::refuse_not_yet(Command::PageServer, settings)?;
            let (server, port) = PageServer::open(settings)?;
            ready(port);
            server.serve()
        };
        serve().map_err(refusal)
    }

    fn cpuinfo(&self, kind: Command, settings: &Settings) -> Result<(), Refusal> {
        let place = settings.place();
        let done = match kind {
            Command::CpuinfoDump => cpuinfo::dump(&place),
            _ => cpuinfo::check(&place, settings.cpu_cap),
        };
        done.map(drop).map_err(|failure| {
            // The number by which callers know that the CPU does not fit.
            let fits_not = kind == Command::CpuinfoCheck && failure.exit == Exit::Unsupported;
            let refusal = refusal(failure);
            match fits_not {
                true => refusal.with_errno(Errno::OPNOTSUPP.raw_os_error()),
                false => refusal,
            }
        })
    }
}

/// The error with its explanation, and the number that callers of CRIU look at.
fn refusal(failure: Failure) -> Refusal {
    let errno = errno(&failure).map(Errno::raw_os_error);
    Refusal {
        errno,
        lines: failure.explained(),
    }
}

fn errno(failure: &Failure) -> Option<Errno> {
    if failure.is_mistyped() {
        return Some(Errno::BADRQC);
    }
    if let Some(DumpError::Freeze(FreezeError::NoTask { .. } | FreezeError::RootDead { .. })) =
        failure.error.downcast_ref()
    {
        return Some(Errno::SRCH);
    }
    match failure.error.downcast_ref() {
        Some(RestoreError::Plan(PlanError::IdTaken { .. })) => Some(Errno::EXIST),
        _ => None,
    }
}
