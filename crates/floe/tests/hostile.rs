//! Images that were damaged or made up: a restore says what is wrong before a process exists.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use floe_image::ImageDir;
use floe_kernel::features::KernelFeatures;
use floe_options::{Place, RestoreOptions};
use testkit::skips::as_root;
use testkit::{Engine, Fixture};

/// How many damaged checkpoints are planned; `FLOE_FUZZ_ROUNDS` makes it another number.
const ROUNDS: usize = 150;
/// The longest that one may take: nothing waits for what a damaged count promises.
const LIMIT: Duration = Duration::from_secs(20);

fn floe() -> Engine {
    Engine::new("floe", env!("CARGO_BIN_EXE_floe"))
}

/// Marsaglia's xorshift; the same damage in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }

    fn damage(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..1 + self.below(3) {
            // Past the magic numbers, most of the time.
            let at = self.below(bytes.len()).max(8 * self.below(2));
            match self.below(4) {
                0 => bytes.truncate(at),
                1 => bytes.extend([0xff, 0xff, 0xff, 0x7f, 0x08, 0x01]),
                _ if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
                _ => {}
            }
        }
    }
}

/// The images of a checkpoint by name, but the manifest: its checksums would find all damage.
fn load(images: &Path) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(images)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".img") && !name.starts_with("pages-") {
            found.insert(name.clone(), fs::read(images.join(&name))?);
        }
    }
    Ok(found)
}

/// Plans damaged forms of a checkpoint; gives how many were refused.
fn plan_damaged(images: &Path) -> anyhow::Result<usize> {
    let whole = load(images)?;
    fs::remove_file(images.join("floe.json"))?;
    let names: Vec<&String> = whole.keys().collect();
    let rounds = std::env::var("FLOE_FUZZ_ROUNDS").ok();
    let rounds = rounds.and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let features = KernelFeatures::probe();
    let place = Place::new(images);
    let options = RestoreOptions::new(place);
    let mut random = Random(88_172_645_463_325_252);
    let mut refused = 0;
    for round in 0..rounds {
        let name = names[random.below(names.len())];
        let mut bytes = whole[name].clone();
        random.damage(&mut bytes);
        fs::write(images.join(name), &bytes)?;
        let began = Instant::now();
        let planned = catch_unwind(AssertUnwindSafe(|| {
            let dir = ImageDir::open(images)?;
            floe_restore::dry_run(dir, &options, &features).map_err(anyhow::Error::from)
        }));
        let planned = planned.map_err(|_| anyhow::anyhow!("a panic"));
        let planned = planned.with_context(|| format!("round {round}: {name}: {bytes:02x?}"))?;
        ensure!(began.elapsed() < LIMIT, "round {round}: {name} took long");
        refused += usize::from(planned.is_err());
        fs::write(images.join(name), &whole[name])?;
    }
    Ok(refused)
}

#[test]
fn damaged_images_are_refused_without_a_panic() {
    as_root("damaged_images_are_refused_without_a_panic", || {
        for program in ["memory-private", "unix-stream", "epoll"] {
            let mut fixture = Fixture::start(program)?;
            fixture.dump(&floe(), &[])?;
            let refused = plan_damaged(fixture.images()).context(program)?;
            println!("{program}: {refused} of {ROUNDS} refused");
            ensure!(refused > 0, "only {refused} were noticed");
        }
        Ok(())
    });
}

#[test]
fn images_are_for_their_owner_only() {
    as_root("images_are_for_their_owner_only", || {
        let mut fixture = Fixture::start("memory-private")?;
        fixture.dump(&floe(), &[])?;
        for entry in fs::read_dir(fixture.images())? {
            let entry = entry?;
            let name = entry.file_name();
            // The log tells no content, and belongs to whoever reads it.
            if name == "dump.log" {
                continue;
            }
            let mode = entry.metadata()?.permissions().mode() & 0o777;
            ensure!(mode & 0o077 == 0, "{name:?} has mode {mode:o}");
        }
        Ok(())
    });
}

#[test]
fn no_secret_of_the_command_reaches_an_image() {
    as_root("no_secret_of_the_command_reaches_an_image", || {
        const SECRET: &str = "floe-secret-7f3a91";
        let fixture = Fixture::start("memory-private")?;
        fs::create_dir_all(fixture.images())?;
        let tree = fixture.family()[0].to_string();
        let mut dump = Command::new(&floe().path);
        dump.args(["dump", "--leave-running", "-t", &tree, "-D"])
            .arg(fixture.images())
            .env("TOKEN", SECRET);
        ensure!(dump.status()?.success(), "the dump failed");
        for entry in fs::read_dir(fixture.images())? {
            let path = entry?.path();
            let content = fs::read(&path)?;
            let there = content
                .windows(SECRET.len())
                .any(|window| window == SECRET.as_bytes());
            ensure!(!there, "{} has the secret", path.display());
        }
        Ok(())
    });
}
