//! From the arguments to the command that runs.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use floe_dump::{Destination, Leftovers, Seal};
use floe_inject::{EngineEnd, Split, Watch};
use floe_kernel::features::KernelFeatures;
use floe_kernel::ids::HostPid;
use floe_options::command::Command;
use floe_options::{CommandLine, ConfigSources, Settings, UsageError};
use floe_restore::new_pids::Inside;

use crate::exit::{Exit, Failure};
use crate::logging::{Log, Target};
use crate::pack::OnTheWay;
use crate::scripts::Scripts;
use crate::{
    check, cpuinfo, demo, engine, explain, help, image, inspect, new_pids, own, pack, page_server,
    report, rpc, squash, statistics, track, unpack, verify,
};

/// A command of Floe's own: its words stand first and have options of their own.
pub struct OwnCommand {
    /// As typed.
    pub name: &'static str,
    /// One line for the help; empty for those that only Floe itself calls.
    pub about: &'static str,
    run: fn(&[OsString]) -> Result<Exit, Failure>,
}

/// Floe's own commands.
pub const OWN_COMMANDS: &[OwnCommand] = &[
    OwnCommand {
        name: "image",
        about: "show, decode and encode image files",
        run: image::run,
    },
    OwnCommand {
        name: "pack",
        about: "put a checkpoint and its chain into one archive",
        run: pack::run,
    },
    OwnCommand {
        name: "unpack",
        about: "take archives apart into a directory",
        run: unpack::run,
    },
    OwnCommand {
        name: "squash",
        about: "make one full checkpoint of a chain",
        run: squash::run,
    },
    OwnCommand {
        name: "inspect",
        about: "show what is in a checkpoint",
        run: inspect::run,
    },
    OwnCommand {
        name: "report",
        about: "write a page about a checkpoint and its chain",
        run: report::run,
    },
    OwnCommand {
        name: "verify",
        about: "check that a checkpoint is whole and can be restored here, and how",
        run: verify::run,
    },
    OwnCommand {
        name: "explain",
        about: "say what a log or an error message means",
        run: explain::run,
    },
    OwnCommand {
        name: "track",
        about: "show or end the tracking of a tree's memory",
        run: track::run,
    },
    OwnCommand {
        name: "keeper",
        about: "",
        run: track::keep,
    },
    OwnCommand {
        name: floe_resources::netlock::COMMAND,
        about: "",
        run: own::unlock,
    },
    OwnCommand {
        name: "demo",
        about: "checkpoint and restore a live program, to see it",
        run: demo::run,
    },
    OwnCommand {
        name: "demo-part",
        about: "",
        run: demo::run_part,
    },
];

/// The program: everything but the conversion of the exit code.
pub fn run(args: Vec<OsString>) -> Exit {
    let mut reporter = Reporter {
        program: program(&args),
        log: Target::StandardError,
        silent: false,
        made: None,
    };
    match dispatch(&args, &mut reporter) {
        Ok(exit) => exit,
        Err(failure) => reporter.report(&failure),
    }
}

/// The name that we were called by.
fn program(args: &[OsString]) -> String {
    let path = args.first().map(Path::new);
    let name = path
        .and_then(Path::file_name)
        .map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "floe".into())
}

/// Where the last error goes: to the log and, in short, to standard error.
struct Reporter {
    program: String,
    log: Target,
    silent: bool,
    /// The directory that was made for images.
    made: Option<PathBuf>,
}

impl Reporter {
    fn report(&self, failure: &Failure) -> Exit {
        let lines = failure.explained();
        if self.log == Target::File {
            lines
                .iter()
                .for_each(|line| tracing::error!(target: "floe", "{line}"));
        }
        if !self.silent {
            let mut text: String = lines
                .iter()
                .map(|line| format!("{}: {line}\n", self.program))
                .collect();
            if failure.is_mistyped() {
                text.push_str(&format!("Try `{} --help`.\n", self.program));
            }
            // Nobody is left to tell if standard error is closed.
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
        failure.exit
    }
}

fn print(text: &str) -> Result<(), Failure> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| Failure::new(Exit::Failed, error))
}

/// As `criu`, the first line is what scripts and engines look for.
fn version(program: &str) -> String {
    let own = format!("floe {}\n", env!("CARGO_PKG_VERSION"));
    if program == "criu" {
        format!("Version: 4.2\n{own}")
    } else {
        own
    }
}

fn dispatch(args: &[OsString], reporter: &mut Reporter) -> Result<Exit, Failure> {
    let own = OWN_COMMANDS
        .iter()
        .find(|own| args.get(1).is_some_and(|word| *word == *own.name));
    if let Some(own) = own {
        return (own.run)(args.get(2..).unwrap_or_default());
    }
    let words = utf8(args.get(1..).unwrap_or_default())?;
    if words.first().is_some_and(|word| word == "help") {
        // The same in other words.
        let mut again = vec![args[0].clone()];
        again.extend_from_slice(&args[2..]);
        again.push("--help".into());
        return dispatch(&again, reporter);
    }
    let line = CommandLine::parse(words)?;
    let mut settings = Settings::default();
    line.apply(&mut settings)?;
    if settings.help {
        print(&help::text(
            line.command(&[]).ok().map(|(command, _)| command),
        ))?;
        return Ok(Exit::Done);
    }
    if settings.version {
        print(&version(&reporter.program))?;
        return Ok(Exit::Done);
    }
    let settings = configured(&line, &settings)?;
    let own: Vec<&str> = OWN_COMMANDS
        .iter()
        .filter(|own| !own.about.is_empty())
        .map(|own| own.name)
        .collect();
    let (command, rest) = line.command(&own)?;
    settings.check(command, rest)?;
    line.refuse_idle(command, &settings)?;
    reporter.silent = settings.log.level == 0;
    if let (Command::Swrk, [fd]) = (command, rest) {
        arm_fault()?;
        return rpc::answer_parent(fd);
    }
    let made = make_images_dir(&settings, command)?;
    reporter.made = made;
    let outcome = execute(command, absolute(settings, command)?, rest, reporter);
    if outcome.is_err() {
        give_back(reporter.made.as_deref());
    }
    outcome
}

pub fn utf8(args: &[OsString]) -> Result<Vec<String>, UsageError> {
    let word = |arg: &OsString| arg.clone().into_string();
    args.iter()
        .map(|arg| word(arg).map_err(|bad| UsageError::NotUtf8(bad.to_string_lossy().into())))
        .collect()
}

/// Configuration files first, then the command line over them.
pub fn configured(line: &CommandLine, from_line: &Settings) -> Result<Settings, Failure> {
    let mut settings = by_files(from_line)?;
    line.apply(&mut settings)?;
    settings.deprecated |= std::env::var_os("CRIU_DEPRECATED").is_some();
    Ok(settings)
}

/// The settings of the configuration files that a command line with `from_line` asks for.
pub fn by_files(from_line: &Settings) -> Result<Settings, Failure> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let environment = std::env::var_os("CRIU_CONFIG_FILE").map(PathBuf::from);
    let mut settings = Settings::default();
    ConfigSources::new(from_line, home.as_deref(), environment).apply(&mut settings)?;
    Ok(settings)
}

/// A dump makes the directory of its images (not those above it): that directory, if it was not there.
fn make_images_dir(settings: &Settings, command: Command) -> Result<Option<PathBuf>, Failure> {
    let directory = settings.place().images_dir;
    if !matches!(command, Command::Dump | Command::PreDump) || directory.exists() {
        return Ok(None);
    }
    let made = std::fs::DirBuilder::new().mode(0o700).create(&directory);
    let shown = directory.display();
    made.map_err(|error| anyhow::anyhow!("making {shown} (--images-dir): {error}"))?;
    Ok(Some(directory))
}

/// A dump failed: the directory that was made for it goes, if there is nothing in it.
fn give_back(made: Option<&Path>) {
    if let Some(directory) = made {
        // It stays with a log or images in it.
        let _ = std::fs::remove_dir(directory);
    }
}

/// Directories are resolved once, so that nothing depends on the current directory later.
fn absolute(mut settings: Settings, command: Command) -> Result<Settings, Failure> {
    let place = settings.place();
    let resolve = |path: &Path, option: &str| {
        let found = std::fs::canonicalize(path);
        found.map_err(|error| anyhow::anyhow!("directory {} ({option}): {error}", path.display()))
    };
    let images = resolve(&place.images_dir, "--images-dir");
    // Who reads images misses them.
    let reads = matches!(
        command,
        Command::Restore | Command::CpuinfoCheck | Command::Dedup
    );
    let images = images.map_err(|error| match reads && settings.archives.is_empty() {
        true => Failure::new(Exit::BadImage, error),
        false => error.into(),
    })?;
    settings.images_dir = Some(images);
    settings.work_dir = Some(resolve(&place.work_dir, "--work-dir")?);
    Ok(settings)
}

fn execute(
    command: Command,
    settings: Settings,
    rest: &[String],
    reporter: &mut Reporter,
) -> Result<Exit, Failure> {
    for fd in &settings.close_fds {
        floe_kernel::inherited::take(*fd)
            .map_err(|error| anyhow::anyhow!("--close {fd}: {error}"))?;
    }
    let log = settings.log_path();
    let program_log = Log::install();
    let opened = program_log.open(log.as_deref(), settings.log.level);
    let shown = log.as_deref().unwrap_or(Path::new("-")).display();
    reporter.log = opened.map_err(|error| anyhow::anyhow!("log file {shown}: {error}"))?;
    refuse_not_yet(command, &settings)?;
    arm_fault()?;
    match command {
        Command::Service => rpc::serve(&settings, program_log),
        Command::Check => check::run(&settings.check),
        Command::Dump | Command::PreDump => {
            // Where the log is standard error, it says so itself.
            if let (Target::File, false, Some(tree)) =
                (reporter.log, reporter.silent, settings.tree)
            {
                track::say_busy(HostPid(tree.get()));
            }
            dump(&settings, command, reporter.made.as_deref())
        }
        Command::Restore => restore(&settings, rest),
        Command::Dedup => track::dedup(&settings.place()),
        Command::PageServer => page_server::run(&settings),
        Command::CpuinfoDump => cpuinfo::dump(&settings.place()),
        Command::CpuinfoCheck => cpuinfo::check(&settings.place(), settings.cpu_cap),
        Command::Exec => Err(gone("exec", "use ptrace or gdb")),
        Command::Show => Err(gone("show", "use `floe image show FILE`")),
        other => Err(Failure::new(
            Exit::Unsupported,
            anyhow::anyhow!("`{}` is not supported yet", other.name()),
        )),
    }
}

/// `FLOE_FAULT=step:N`, for tests: the N-th step of a dump or restore kills the engine.
fn arm_fault() -> Result<(), Failure> {
    let Some(text) = std::env::var_os("FLOE_FAULT") else {
        return Ok(());
    };
    let step = text.to_str().and_then(|text| text.strip_prefix("step:"));
    let step = step.and_then(|step| step.parse().ok());
    let step = step.ok_or(UsageError::Conflict("FLOE_FAULT must be step:N"))?;
    floe_kernel::fault::arm(Some(step));
    Ok(())
}

fn gone(command: &str, instead: &str) -> Failure {
    Failure::new(
        Exit::Usage,
        anyhow::anyhow!("`{command}` is gone from CRIU as well: {instead}"),
    )
}

/// Refuses options that this version takes but cannot follow.
pub fn refuse_not_yet(command: Command, settings: &Settings) -> Result<(), Failure> {
    let rows = settings.not_yet(command);
    if rows.is_empty() {
        return Ok(());
    }
    let text: Vec<String> = rows
        .iter()
        .map(|row| format!("{} is not supported yet: {}", row.option, row.instead))
        .collect();
    Err(Failure::new(
        Exit::Unsupported,
        anyhow::anyhow!("{}", text.join("\n")),
    ))
}

/// The scripts and the status descriptor of the settings.
pub fn scripts(settings: &Settings) -> Result<Arc<Scripts>, Failure> {
    let take = |fd: i32| {
        floe_kernel::inherited::take(fd)
            .map_err(|error| anyhow::anyhow!("--status-fd {fd}: {error}"))
    };
    let place = settings.place();
    Ok(Arc::new(Scripts {
        scripts: settings.action_scripts.clone(),
        work_dir: place.work_dir,
        images_dir: place.images_dir,
        status: Mutex::new(settings.status_fd.map(take).transpose()?),
    }))
}

/// The process that the caller knows watches over a child that does the work.
fn dump(settings: &Settings, command: Command, made: Option<&Path>) -> Result<Exit, Failure> {
    let in_rounds = command == Command::Dump && settings.iterate;
    let tree = settings.tree.filter(|_| in_rounds);
    let images = settings.place().images_dir;
    let before = tree.map(|tree| Leftovers::before(HostPid(tree.get()), &images));
    let supervisor = match floe_inject::split() {
        Ok(Split::Engine(watch)) => return dump_watched(settings, command, &watch),
        Ok(Split::Supervisor(supervisor)) => supervisor,
        Err(error) => return Err(anyhow::anyhow!("starting the engine: {error}").into()),
    };
    match supervisor.wait() {
        // The engine has said all there is to say.
        Ok(EngineEnd::Exited(code)) => {
            if code != 0 {
                give_back(made);
            }
            std::process::exit(code)
        }
        Ok(EngineEnd::Killed(signal)) => {
            before.as_ref().map(Leftovers::remove);
            floe_dump::settle_after_kill(&images);
            if let Some(archive) = &settings.archive {
                OnTheWay::remove_left(archive, &images, supervisor.engine());
            }
            give_back(made);
            let error = anyhow::anyhow!(
                "the dump was killed by signal {signal}; the tasks run on as before"
            );
            Err(error.into())
        }
        Err(error) => Err(anyhow::anyhow!("waiting for the engine: {error}").into()),
    }
}

fn dump_watched(settings: &Settings, command: Command, watch: &Watch) -> Result<Exit, Failure> {
    let mut options = settings.dump_options(scripts(settings)?)?;
    let codec = settings.compress.as_deref();
    let in_rounds = command == Command::Dump && settings.iterate;
    let archive = settings
        .archive
        .as_deref()
        .map(|file| OnTheWay::begin(file, codec, (&mut options.place, in_rounds), watch))
        .transpose()?;
    let features = KernelFeatures::probe();
    let seal_archive = || -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let sealed = archive.as_ref().map_or(Ok(()), OnTheWay::seal);
        sealed.map_err(|failure| failure.error.into())
    };
    let seal: Option<&Seal<'_>> = archive.is_some().then_some(&seal_archive);
    let dumped = match command {
        Command::Dump if in_rounds => {
            let environment = (&features, watch);
            let rounds = settings.rounds;
            engine::dump_in_rounds((&options, seal), rounds, environment, &engine::say)
        }
        Command::PreDump => engine::pre_dump(&options, &features, watch),
        _ => {
            let store = archive.as_ref().and_then(OnTheWay::store);
            let destination = Destination { store, seal };
            engine::dump_to(&destination, &options, (&features, watch))
        }
    };
    if dumped.is_ok() && settings.display_stats {
        shown(show_statistics(&options.place.work_dir));
    }
    match (archive, codec) {
        (Some(archive), _) => archive.give_up(),
        (None, Some(codec)) if dumped.is_ok() => {
            engine::compress(&options.place.images_dir, codec)?;
        }
        _ => {}
    }
    dumped?;
    tracing::info!("Dumping finished successfully");
    Ok(Exit::Done)
}

/// What was done is done, whether or not its statistics can be shown.
fn shown(outcome: Result<(), Failure>) {
    if let Err(failure) = outcome {
        tracing::warn!("the statistics cannot be shown: {:#}", failure.error);
    }
}

pub fn show_statistics(work_dir: &Path) -> Result<(), Failure> {
    let stats = statistics::of_dump(work_dir);
    let stats = stats.map_err(|error| Failure::new(Exit::BadImage, error))?;
    let text = stats.as_ref().map(statistics::dump_text);
    print(&text.unwrap_or_default())
}

/// Prints what a restore has noted in its work directory.
pub fn show_restore_statistics(work_dir: &Path) -> Result<(), Failure> {
    let stats = statistics::of_restore(work_dir);
    let stats = stats.map_err(|error| Failure::new(Exit::BadImage, error))?;
    let text = stats.as_ref().map(statistics::restore_text);
    print(&text.unwrap_or_default())
}

fn restore(settings: &Settings, rest: &[String]) -> Result<Exit, Failure> {
    match settings.new_pidns && !settings.dry_run {
        true => new_pids::restore(settings, |settings, inside| {
            restore_here(settings, rest, Some(inside))
        }),
        false => restore_here(settings, rest, None),
    }
}

/// Restores in the namespaces where we are; tells of it on the line to a process outside.
fn restore_here(
    settings: &Settings,
    rest: &[String],
    inside: Option<Inside>,
) -> Result<Exit, Failure> {
    let options = settings.restore_options(scripts(settings)?);
    if settings.dry_run {
        let steps = engine::dry_run(&options, &KernelFeatures::probe())?;
        print(
            &steps
                .iter()
                .map(|step| format!("{step}\n"))
                .collect::<String>(),
        )?;
        return Ok(Exit::Done);
    }
    let root = engine::restore(&options, &KernelFeatures::probe())?;
    if let Some(inside) = inside {
        let told = inside.restored(root);
        told.map_err(|error| anyhow::anyhow!("telling the caller that the tree runs: {error}"))?;
    }
    if settings.display_stats {
        shown(show_restore_statistics(&options.place.work_dir));
    }
    if let (true, Some((program, args))) = (settings.exec_cmd, rest.split_first()) {
        let error = std::process::Command::new(program).args(args).exec();
        return Err(anyhow::anyhow!("becoming {program}: {error}").into());
    }
    if settings.detached {
        return Ok(Exit::Done);
    }
    engine::wait_for_children()
}
